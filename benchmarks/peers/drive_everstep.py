"""Ours: everstep.LLM in this process, token ids in and out."""

import os

# what every command of ours sets before torch is loaded (engine/config.py)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from protocol import serve

import everstep
from everstep import LLM, SamplingParams, kernels


class Everstep:
    def load(self, model: str, *, threads: int, context: int, concurrent: int) -> dict[str, str]:
        self.llm = LLM(
            model,
            skip_tokenizer_init=True,
            num_threads=threads,
            max_model_len=context,
            max_num_seqs=concurrent,
            prefix_caching=False,
        )
        # a core of its own has its level in its numerics; this process would have chosen the same
        return {
            "version": everstep.__version__,
            "path": f"everstep.LLM.generate, level {kernels.level_name()}",
        }

    def generate(self, prompts: list[list[int]], new_tokens: int, seed: int) -> int:
        sampling = [
            SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=seed + i)
            for i in range(len(prompts))
        ]
        return sum(len(r.output_ids) for r in self.llm.generate(prompts, sampling))


serve(Everstep)
