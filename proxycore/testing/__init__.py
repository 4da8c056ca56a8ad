"""For those who test a backend.

`conformance.run_scenario` holds a backend against the scenarios under `scenarios/`, by the real command line and real
packets; `lab.Lab` is the network around it, `netns` what that is made of.  `states` are short ways to write what a backend gets;
`cluster` and `clients` are for what must not be noticed: a proxy that comes and goes while connections are made.
`uml` brings a kernel with IPVS to hosts that have none, for a command or for tests marked `ipvs`.
"""
