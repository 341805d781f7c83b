"""GRPO with IcePop in plain PyTorch, over a running server. Copy it, and change what is yours.

    everstep serve ./model --port 8000
    python clients/recipes/grpo.py ./model questions.jsonl

A line of questions.jsonl is {"prompt": "…", "answer": "…"}. Several ranks: `everstep train`.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch

from everstep import Client
from everstep.engine.checkpoint.stored_format import StoredFormat
from everstep.trainer_bridge.losses.config import LossConfig
from everstep.trainer_bridge.losses.losses import LossInputs, make_loss
from everstep.trainer_bridge.losses.metrics import metrics_of
from everstep.trainer_bridge.rewards.rewards import RewardConfig, reward_sample
from everstep.trainer_bridge.rewards.workers import Rewards
from everstep.trainer_bridge.trainer.canaries import make_canaries, texts_of
from everstep.trainer_bridge.trainer.packing import pack
from everstep.trainer_bridge.trainer.sharding import join_world, shard
from everstep.trainer_bridge.trainer.trainable import TrainableRing, trainable_config
from everstep.trainer_bridge.trajectories.samples import Group, sample_of
from everstep.trainer_bridge.weights.sender import WeightSender
from everstep.trainer_bridge.weights.targets import Here

PROMPTS, GROUP, LR = 16, 8, 1e-5
SAMPLING = {"temperature": 1.0, "max_tokens": 512}


def sample(
    client: Client, rewards: Rewards, ring: TrainableRing, batch: Iterable[dict[str, str]]
) -> list[Group]:
    """A group of rewarded rollouts for each question; the server runs all of them together."""
    sent = [client.submit(q["prompt"], samples=GROUP, sampling=SAMPLING, metadata=q) for q in batch]
    groups = []
    for one in sent:
        rollouts = [client.wait(name) for name in one.rollout_ids]
        outcomes = rewards.score([reward_sample(rollout) for rollout in rollouts])
        pairs = zip(rollouts, outcomes, strict=True)
        samples = [sample_of(r, ring.config, reward=outcome.reward) for r, outcome in pairs]
        groups.append(Group.of(one.group_id, samples))
        client.ack(one.rollout_ids)
    return groups


def columns(ring: TrainableRing, groups: Sequence[Group], version: int) -> LossInputs:
    """One forward pass over all rollouts, end to end; a column has all of their response tokens."""
    samples = [sample for group in groups for sample in group.samples]
    batch = pack([sample.sequence for sample in samples])
    scores, owner = ring(batch), batch.responses[0]
    return LossInputs(
        lp_new=scores.lp[None],  # one update a batch: without lp_old it is this, detached
        lp_infer=torch.cat([torch.from_numpy(s.lp_infer) for s in samples])[None],
        advantages=torch.tensor([s.advantage for s in samples])[owner][None],
        mask=torch.ones_like(scores.lp, dtype=torch.bool)[None],
        sequence_ids=owner[None],
        lag=version - torch.cat([torch.from_numpy(s.versions) for s in samples])[None],
        entropy=scores.entropy[None],
    )


def train(
    url: str, model: Path, questions: Iterator[dict[str, str]], reward: RewardConfig, steps: int
) -> Iterator[dict[str, float]]:
    """The metrics of each step; when they are there the server has its weights."""
    loss, ring = make_loss(LossConfig()), TrainableRing(trainable_config(model), device="meta")
    with Client(url) as client, Rewards(reward) as rewards, join_world("cpu") as world:
        target = Here(world, model.parent / "versions")
        stored = StoredFormat(ring.config, getattr(torch, ring.config.dtype))
        shard(ring, world, stored.dtype)
        ring.load(model)
        adam = torch.optim.AdamW(ring.parameters(), lr=LR, weight_decay=0.01)
        sender = WeightSender(ring, world, target, source=model, stored=stored, lineage="grpo")
        first = client.weights().current.number + 1
        client.update_weights(sender.publish(first).path)  # both sides begin with the same weights
        for version in range(first + 1, first + 1 + steps):
            groups = sample(client, rewards, ring, islice(questions, PROMPTS))
            inputs = columns(ring, groups, version - 1)
            output = loss(inputs)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(ring.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            canaries = make_canaries(ring, world, texts_of(groups, 4))
            client.update_weights(sender.publish(version, canaries).path)
            given = [s.reward for g in groups for s in g.samples if s.reward is not None]
            yield {"reward": sum(given) / len(given), **metrics_of(inputs, output)}


if __name__ == "__main__":
    loop = cycle(map(json.loads, Path(sys.argv[2]).read_text().splitlines()))
    for found in train("http://localhost:8000", Path(sys.argv[1]), loop, RewardConfig(), 100):
        print({name: round(found[name], 5) for name in ("reward", "kl_k3", "mask_fraction")})
