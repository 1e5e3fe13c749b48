"""A real Kubernetes API server with scheduler and controllers; cluster_nodes.py has its nodes.

NetworkPolicies are stored, not enforced.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cluster_nodes import NODES, Nodes, Object, act_as_kubelet, create_node
from manifests import REPOSITORY, kubectl
from processes import free_port

PROGRAMS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


def program_folder(unpacked: Path) -> Path:
    """Folder with the programs: KUBEBUILDER_ASSETS, or the archive beside the repository; skips the test without."""
    given = os.environ.get("KUBEBUILDER_ASSETS")
    archive = Path(os.environ.get("CONTROL_PLANE_DIR", REPOSITORY.parent / "shared" / "control-plane"))
    if given:
        missing = [name for name in PROGRAMS if not (Path(given) / name).is_file()]
        if missing:
            pytest.skip(f"KUBEBUILDER_ASSETS={given} has no {', '.join(missing)}")
        return Path(given)
    if not archive.is_dir():
        pytest.skip(f"no control plane at {archive}; set KUBEBUILDER_ASSETS to a folder with {', '.join(PROGRAMS)}")
    unpacked.mkdir(parents=True)
    for name in PROGRAMS:
        with (unpacked / name).open("wb") as stream:
            subprocess.run(["xz", "-dc", archive / f"{name}.xz"], stdout=stream, check=True)
        (unpacked / name).chmod(0o755)
    return unpacked


@dataclass(kw_only=True)
class Cluster(Nodes):
    """A running control plane."""

    kubeconfig: Path
    programs: "Programs"

    def restart(self, name: str) -> None:
        """Kill one of PROGRAMS and start it again on the same data; wait until the API server responds."""
        self.programs.kill(name)
        self.programs.start(name)
        self.wait(self.programs.is_serving, "the API server responds", 180)

    def kubectl(self, *words: str, check: bool = True, data: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run kubectl; raises with its output unless `check` is false."""
        command = [kubectl(), "--kubeconfig", f"{self.kubeconfig}", *words]
        done = subprocess.run(command, capture_output=True, text=True, input=data, timeout=120, cwd=REPOSITORY)
        assert not check or done.returncode == 0, f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done

    def pods(self, namespace: str) -> list[Object]:
        """The pods of a namespace."""
        return self.get(f"/api/v1/namespaces/{namespace}/pods")["items"]

    def ready_pods(self, namespace: str, service: str = "api") -> list[str]:
        """Names of the ready pods behind a Service."""
        slices = self.get(
            f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
            f"?labelSelector=kubernetes.io/service-name={service}"
        )["items"]
        return [
            endpoint["targetRef"]["name"]
            for each in slices
            for endpoint in each.get("endpoints") or ()
            if endpoint["conditions"].get("ready")
        ]

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Wait until `condition()` is true."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not after {seconds} s\n{self.events()}"
            time.sleep(0.1)

    def events(self) -> str:
        """The last warnings, for error messages."""
        items = self.get("/api/v1/events?fieldSelector=type=Warning")["items"][-8:]
        return "\n".join(f"{each['involvedObject']['name']}: {each['message']}" for each in items)


class Programs:
    """The processes of a control plane on loopback, with data in `folder`."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs = folder, programs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._etcd, self._peer, port = free_port(), free_port(), free_port()
        self._port = port
        token = secrets.token_hex(16)
        (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n")
        subprocess.run(["openssl", "genrsa", "-out", folder / "sa.key", "2048"], check=True, capture_output=True)
        url = f"https://127.0.0.1:{port}"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": url, "insecure-skip-tls-verify": True}}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "admin"}}],
            "current-context": "test",
        }
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(config))
        headers = {"authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=url, verify=False, headers=headers, timeout=30)

    def start(self, name: str) -> None:
        """Start one of PROGRAMS."""
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [self._programs / name, *self._arguments(name)]
            self._running[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """End one of PROGRAMS at once, as a crash does."""
        self._running[name].kill()
        self._running.pop(name).wait()

    def is_serving(self) -> bool:
        """Whether the API server is ready; fails if it has ended."""
        assert self._running["kube-apiserver"].poll() is None, (self.folder / "kube-apiserver.log").read_text()[-2000:]
        try:
            return self.client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End all programs and remove the data of etcd."""
        for process in reversed(self._running.values()):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._running.values()):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.client.close()
        shutil.rmtree(self.folder / "etcd", ignore_errors=True)

    def _arguments(self, name: str) -> list[str]:
        if name == "etcd":
            return self._etcd_arguments()
        if name == "kube-apiserver":
            return self._api_server_arguments()
        arguments = [f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", f"--secure-port={free_port()}"]
        arguments.append(f"--cert-dir={self.folder}/certificates")
        if name == "kube-controller-manager":
            arguments += [f"--service-account-private-key-file={self.folder}/sa.key", "--node-monitor-grace-period=20s"]
        return arguments

    def _etcd_arguments(self) -> list[str]:
        return (
            ["--data-dir", f"{self.folder}/etcd", "--unsafe-no-fsync", "--log-level", "warn"]
            + [f"--{kind}-client-urls=http://127.0.0.1:{self._etcd}" for kind in ("listen", "advertise")]
            + [f"--{kind}-peer-urls=http://127.0.0.1:{self._peer}" for kind in ("listen", "initial-advertise")]
            + [f"--initial-cluster=default=http://127.0.0.1:{self._peer}"]
        )

    def _api_server_arguments(self) -> list[str]:
        folder = self.folder
        return [
            f"--etcd-servers=http://127.0.0.1:{self._etcd}",
            f"--secure-port={self._port}",
            "--bind-address=127.0.0.1",
            f"--cert-dir={folder}/certificates",
            f"--token-auth-file={folder}/tokens.csv",
            "--authorization-mode=Node,RBAC",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder}/sa.key",
            f"--service-account-signing-key-file={folder}/sa.key",
            "--endpoint-reconciler-type=none",
            # by default five minutes
            "--default-not-ready-toleration-seconds=2",
            "--default-unreachable-toleration-seconds=2",
        ]


@contextmanager
def control_plane(folder: Path, program_files: Path) -> Iterator[Cluster]:
    """Start the programs, register the nodes and act as their kubelet; stop all afterwards."""
    programs = Programs(folder, program_files)
    cluster = Cluster(client=programs.client, kubeconfig=programs.kubeconfig, programs=programs)
    kubelet = threading.Thread(target=act_as_kubelet, args=(cluster,), daemon=True)
    try:
        for name in PROGRAMS:
            programs.start(name)
            if name == "kube-apiserver":
                cluster.wait(programs.is_serving, "the API server responds", 180)
        for number, name in enumerate(NODES):
            create_node(cluster.client, number, name)
        cluster.wait(lambda: cluster.get("/api/v1/namespaces/default/serviceaccounts/default"), "the controllers run")
        kubelet.start()
        yield cluster
    finally:
        cluster.stop.set()
        if kubelet.ident:
            kubelet.join(30)
        programs.stop()
