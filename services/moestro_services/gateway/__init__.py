"""The gateway: an OpenAI-compatible REST address for deployed models, and an API over what a home holds.

A request passes `connections` (time and size of its head), `requests_log`, `door` (whose key of `keys`, with `access` to
what, within which `limits`: a `caller`), `app` (the FastAPI application), `proxy` (which model, which version),
`steering`, and `exchange` (to vLLM and back, through `upstream`); `errors` words refusals, `usage`, `traffic` and
`expert_metrics` count.

Beside it, `controller` looks at the model registry, `fleet` makes traffic follow it, by the tables of `routes`; each
`replica` keeps one vLLM process alive, and `watch` takes bad versions back. `sources` says where models come from,
`assembly` makes the application of a home, `launch` runs it, `listening` takes the port.

Under /api, `inventory` shows what a home holds, `management` and `lifecycles` change it, and `openings` says what of a
config no request may set; `openapi` describes all. `readiness` answers /ready and /v1/models.
"""
