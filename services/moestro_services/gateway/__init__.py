"""The gateway: an OpenAI-compatible REST address for deployed models, and an API over what a home holds.

A request passes `app` (the FastAPI application), `proxy` (which model, which version), `exchange` (to vLLM and back,
through `upstream`); `errors` words refusals, `usage` and `traffic` count, `access` decides who may ask.

Beside it, `controller` looks at the model registry, `fleet` makes traffic follow it, by the tables of `routes`; each
`replica` keeps one vLLM process alive, and `watch` takes bad versions back. `sources` says where models come from,
`assembly` puts the parts together, `launch` starts them, `listening` takes the port.

`door` lets requests in by `keys` and `limits`, `connections` bounds what is no request yet, `requests_log` writes them
down. `steering` lets administrators name a profile, `expert_metrics` tells how experts are used. Under /api are
`inventory` (what the home holds), `management` (models, versions, traffic) and `lifecycles`; `openapi` describes all.
"""
