"""vLLM's worker with steering: every request that names a profile is routed by it, all others as ever.

`--worker-cls moestro.inference.steering_worker.SteeringWorker` puts it in the place of the platform's own worker, and
`--additional-config` names the profiles' files (`steering_arguments`). Nothing of vLLM is changed beyond instances
of this worker: the routers of its model, and its model runner. Only vLLM imports this module.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm.platforms import current_platform

from moestro.errors import InputError
from moestro.inference.steering import PROFILES_KEY
from moestro.inference.steering_routers import SteeredRouters, check_settings
from moestro.inference.worker import WorkerExtension
from moestro.models.steering_profiles import Profile

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class SteeringWorker(PlatformWorker, WorkerExtension):
    """The platform's worker, whose routers follow profiles.

    vLLM mixes an engine's extension into the platform's class for good, and refuses to do it again to a class that has
    inherited it meanwhile; so this one has the extension from the start.
    """

    def load_model(self, **options: Any) -> None:
        """Load the model and give its routers the profiles.

        Raises `InputError` for settings or a model under which profiles would not be followed exactly.
        """
        super().load_model(**options)
        check_settings(self.vllm_config)
        handed: Mapping[str, str] = self.vllm_config.additional_config[PROFILES_KEY]
        profiles = {name: Profile.read(Path(path)) for name, path in handed.items()}
        if self.use_v2_model_runner:
            raise InputError("Steering needs vLLM's model runner V1.", hint="Set VLLM_USE_V2_MODEL_RUNNER=0.")
        self.steered_routers = SteeredRouters(self.model_runner, profiles)
        self.steered_routers.install()

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache, and the second one that contrast profiles need."""
        super().initialize_from_config(kv_cache_config)
        self.steered_routers.allocate_weak_cache()
