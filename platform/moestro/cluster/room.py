"""Whether a cluster has a place for a stage: cores are counted by node, for a worker does not span two."""

from moestro.errors import ResourceError


def check_room(stage: str, *, cpus: int, workers: int) -> None:
    """Raise `ResourceError` if the nodes cannot hold so many workers at once, even when nothing else runs."""
    import ray

    nodes = sorted((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), reverse=True)
    if sum(cores // cpus for cores in nodes) >= workers:
        return
    asked = f"{cpus} cores" if workers == 1 else f"{workers} workers with {cpus} cores each"
    raise ResourceError(
        f"{stage} asks for {asked}, the cluster's nodes have {', '.join(map(str, nodes)) or 'none'}.",
        hint="Ask for fewer in `resources`, or add a node that has them.",
    )
