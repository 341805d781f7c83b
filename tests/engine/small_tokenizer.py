"""A byte-level tokenizer for a vocabulary of 300, built in memory."""

import json
import tempfile
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers

from everstep.engine.tokenizer import Tokenizer


@cache
def small_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    for index in range(256, 300):
        vocab[f"Ġw{index}"] = index
    made = HFTokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        made.save(f"{folder}/tokenizer.json")
        Path(folder, "tokenizer_config.json").write_text(json.dumps({}))
        Path(folder, "config.json").write_text(json.dumps({}))
        return Tokenizer.from_folder(Path(folder))
