"""The gateway: an OpenAI-compatible REST address for deployed models, and a read-only API over what a home holds.

`app` builds the FastAPI application, `proxy` passes model requests to vLLM and streams its answers back,
`inventory` answers /api, `schemas` has its models, `access` decides who may ask, `traffic` counts, `errors` words
refusals, `launch` starts a deployment's vLLM server and serves the gateway before it.
"""
