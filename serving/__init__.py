"""Tokenloft's serving layer: the OpenAI-compatible edge, the prefill and decode deployments, the engine."""
