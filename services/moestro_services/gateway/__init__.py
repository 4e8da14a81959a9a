"""The gateway: an OpenAI-compatible REST address for deployed models, and an API over what a home holds.

A request passes `app` (the FastAPI application), `proxy` (which model, which version), `exchange` (to vLLM and back,
through `upstream`); `errors` words refusals, `usage` and `traffic` count, `access` decides who may ask.

Beside it, `controller` looks at the model registry, `fleet` makes traffic follow it, by the tables of `routes`; each
`replica` keeps one vLLM process alive, and `watch` takes bad versions back. `sources` says where models come from,
`launch` puts all together, `listening` takes the port. `inventory` answers /api, `schemas` has its models, `readiness`
answers /ready and /v1/models.
"""
