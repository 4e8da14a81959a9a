"""Ray: stages as tasks on a cluster, or on one started in place.

`connection` is the cluster, `group` several workers that train together, `engine` a rollout engine in an actor, `board`
how a worker's reports reach the driver, `claims` whose work may be taken over, `room` whether there are enough cores.
"""

from moestro.cluster.connection import Cluster
from moestro.cluster.engine import RemoteEngine

__all__ = ["Cluster", "RemoteEngine"]
