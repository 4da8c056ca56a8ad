"""Sources of Kubernetes objects: a folder of manifests, a recording."""
