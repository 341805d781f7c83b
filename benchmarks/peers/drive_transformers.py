"""transformers: one static batch through `generate`, the KV cache in place."""

import os

from protocol import serve


class Transformers:
    def load(self, model: str, *, threads: int, **_: int) -> dict[str, str]:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        dtype = os.environ["BENCH_DTYPE"]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype)
        ).eval()
        return {
            "version": f"{transformers.__version__}, torch {torch.__version__}",
            "path": f"generate on one static batch, {dtype}",
        }

    def generate(self, prompts: list[list[int]], new_tokens: int, seed: int) -> int:
        torch = self.torch
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )
        return (out.shape[1] - ids.shape[1]) * len(prompts)


serve(Transformers)
