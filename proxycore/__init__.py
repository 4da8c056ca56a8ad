"""kube-proxy as a pluggable framework.  The public names are in `proxycore.api`."""

__version__ = "0.1.0"
