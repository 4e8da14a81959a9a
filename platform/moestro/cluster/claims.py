"""Claims of Ray tasks on an artifact: what is written into them, and whose process the cluster takes for lost.

Ray runs a task again only when it has given up the worker that ran it. A node that it has declared dead may well be
alive and only out of reach, and so may what a killed driver has started.
"""

from collections.abc import Mapping

from moestro.artifacts import Claimant

TASK, NODE, JOB = "task", "node", "job"


def claimant(key: str) -> Claimant:
    """Of this worker, for the task submitted under `key`."""
    import ray

    context = ray.get_runtime_context()
    return Claimant(
        {TASK: key, NODE: context.get_node_id(), JOB: context.get_job_id()}, lambda labels: _lost(labels, key)
    )


def _lost(labels: Mapping[str, str], key: str) -> bool:
    """Whether the cluster has given up the process with these labels: this task runs anew, its node is dead, or its
    driver has ended. Of a node that this cluster has never had nothing is known."""
    import ray
    from ray._private.state import jobs

    if labels.get(TASK) == key:
        return True
    alive = {node["NodeID"]: node["Alive"] for node in ray.nodes()}
    if (node := labels.get(NODE)) not in alive:
        return False
    return not alive[node] or any(job["JobID"] == labels[JOB] and job["IsDead"] for job in jobs())
