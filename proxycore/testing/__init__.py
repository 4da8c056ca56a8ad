"""For those who test a backend.

`conformance.run_scenario` holds a backend against the scenarios under `scenarios/`, by the real command line and real
packets; `lab.Lab` is the network around it, `netns` what that is made of.
"""
