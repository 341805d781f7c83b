"""`everstep bench`: throughput and latencies in the words of `vllm bench serve`."""
