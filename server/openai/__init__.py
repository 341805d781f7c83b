"""/v1: OpenAI's completions and chat completions, and vLLM's extras."""
