"""The gateway: policies before live engines, as the endpoint picker of a real Envoy."""
