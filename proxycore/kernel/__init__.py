"""Typed edges to the kernel: one netlink family or tool a module."""
