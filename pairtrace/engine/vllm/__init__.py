"""vLLM as an engine: extraction, rollouts and judging.

Only `connector` touches what vLLM does not document; `installed` says with which versions that was tried.
"""
