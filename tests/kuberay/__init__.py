"""JSON Schemas of KubeRay's RayJob and RayCluster, so that the manifests are checked without its 2 MB of CRDs."""
