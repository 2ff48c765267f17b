"""Our own engine behind the relay, in a process of its own: beside other models, or several times."""

from __future__ import annotations

import os

from serve.engines.kind import gpus
from serve.engines.process import Launch
from serve.engines.translation import AsIs, Translation
from serve.keys import GATEWAY
from serve.settings import Settings
from suite import envs
from suite.envs import Environment
from suite.processes import importing


class Own:
    """`python -m serve`: a gateway with this model alone, which takes adapters while it runs."""

    name = "torch"
    loads_adapters = True
    parser = ""

    def translation(self, settings: Settings) -> Translation:  # noqa: ARG002
        """It speaks as we do."""
        return AsIs()

    def check(self, settings: Settings) -> None:
        """It takes what we take."""

    def precision(self, settings: Settings) -> str:
        """Left to the engine."""
        return settings.dtype

    def room(self, settings: Settings) -> int | None:  # noqa: ARG002
        """As many as are wanted."""
        return None

    def launch(self, settings: Settings, environment: Environment, port: int, key: str, replica: int) -> Launch:
        """Who may ask, and what an alias stands for, is decided before it is asked; limits hold there too."""
        alone = {
            "host": "127.0.0.1", "port": port, "log": "off", "replicas": 1, "beside": (), "alias": {}, "cors": [],
            "tls_cert": None, "tls_key": None, "api_key_file": None, "lora_dir": [], "trusting": True,
        }  # fmt: skip
        found = {GATEWAY: key, "HF_HUB_OFFLINE": "1"}
        if envs.device() == "cuda":
            found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus(replica, 1))
        elif settings.replicas > 1:
            threads = max(1, (os.cpu_count() or 1) // settings.replicas)
            found |= {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "OMP_WAIT_POLICY": "passive"}
        asked = settings.model_copy(update=alone).model_dump_json()
        # other interpreters are given none of our paths
        ours = ["env", f"PYTHONPATH={importing()['PYTHONPATH']}"]
        return Launch([*ours, str(environment.python), "-P", "-m", "serve", asked], found)
