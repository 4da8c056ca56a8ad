"""For those who test a backend: a packet lab in network namespaces and the conformance scenarios."""
