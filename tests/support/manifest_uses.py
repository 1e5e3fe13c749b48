"""How each component is used: what a test renders for those that no overlay of ours has."""

SETTINGS = {
    "MODEL_SOURCE": "demo",
    "MODEL": "demo",
    "CANARY_MODEL": "tuned",
    "MODEL_IMAGE": "registry.example.com/glm-model:1",
    "TRAIN_FILE": "train.jsonl",
    "TEST_FILE": "dev.jsonl",
    "RUN": "first",
    "GPU_MEMORY_ABOVE_MIB": "22000",
    "HOST": "glm.example.com",
    "INGRESS_CLASS": "nginx",
    "INGRESS_NAMESPACE": "ingress-nginx",
    "GATEWAY": "public",
    "GATEWAY_NAMESPACE": "gateways",
    "MONITORING_NAMESPACE": "monitoring",
    "PROMETHEUS_URL": "http://prometheus.monitoring:9090",
}
SERVING = ["namespace", "model-store", "serve"]
TRAINING = ["namespace", "model-store", "outputs", "train"]
RUN = ["settings-model", "settings-training"]
# component -> bases and components that it is used with, in order
USES = {
    "autoscale-keda": (SERVING, ["vllm", "replicated", "autoscale-keda", "settings-model"]),
    "canary": (SERVING, ["vllm", "replicated", "autoscale-queue", "settings-model", "gpu/memory", "canary"]),
    "gateway": ([*SERVING, "web"], ["gateway", "settings-model"]),
    "gpu-nodes-only": ([*SERVING, "web"], ["quantize", "settings-model", "cpu-nodes", "gpu-nodes-only"]),
    "gpu/a100-80g": (SERVING, ["vllm", "settings-model", "gpu/a100-80g"]),
    "gpu/h100": (TRAINING, [*RUN, "gpu/h100"]),
    "gpu/l20": ([*SERVING, "outputs", "evaluate"], ["vllm", "settings-model", "settings-evaluation", "gpu/l20"]),
    "gpu/rtx-4090": (SERVING, ["vllm", "settings-model", "gpu/rtx-4090"]),
    "gpu/t4": (SERVING, ["vllm", "settings-model", "gpu/t4"]),
    "int4": (SERVING, ["vllm", "int4", "settings-model", "gpu/memory"]),
    "jobset": (TRAINING, ["two-nodes", *RUN, "gpu/memory", "jobset"]),
    "kueue": (TRAINING, [*RUN, "gpu/memory", "kueue"]),
    "model-image": (["namespace", "model-store", "serve"], ["vllm", "model-image", "settings-model", "gpu/memory"]),
    "model-on-node": (SERVING, ["vllm", "model-on-node", "settings-model", "gpu/memory"]),
    "monitoring": (SERVING, ["settings-model", "monitoring"]),
    "runtime-class": ([*TRAINING, "serve", "evaluate"], ["vllm", *RUN, "settings-evaluation", "runtime-class"]),
    "site-mirror": (SERVING, ["site-mirror", "quantize", "settings-model"]),
    "trainjob": (TRAINING, ["two-nodes", *RUN, "gpu/memory", "trainjob"]),
    "upload": (["namespace", "outputs"], ["upload"]),
    "no-keys": ([*SERVING, "web", "web-streamlit"], ["settings-model", "no-keys"]),
}
