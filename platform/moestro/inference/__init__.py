"""vLLM, the only place that imports it: an engine in this process for rollouts, a supervised server for traffic.

`engine` generates and scores token ids and refreshes weights, `worker` is its arm inside vLLM's worker, `routes`
checks what vLLM says about routing, `server` runs the OpenAI-compatible server under `supervisor`, `client` scores
over HTTP, `timing` times it, `footprint` weighs its processes. Importing any of them does not import vLLM.
"""
