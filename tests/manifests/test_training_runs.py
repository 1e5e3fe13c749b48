"""Jobs finish and are removed; a training run resumes, saves and stops as k8s/README.md describes."""

import pytest
from manifests import container, environment, objects, one, pod_template

from entrypoints.training.launch import SHUTDOWN_SECONDS


def test_every_job_has_a_retry_limit_a_ttl_and_stops_at_a_usage_error(every):
    """Otherwise a mistake would restart pods forever, and finished Jobs would accumulate."""
    jobs = [manifest["spec"] for manifest in every if manifest["kind"] == "Job"]
    jobs += [manifest["spec"]["jobTemplate"]["spec"] for manifest in every if manifest["kind"] == "CronJob"]
    assert len(jobs) >= 9
    for job in jobs:
        assert job["backoffLimit"] <= 12
        assert job["ttlSecondsAfterFinished"] > 0
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        if job["backoffLimit"]:
            rules = job["podFailurePolicy"]["rules"]
            assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
            assert any(
                2 in rule.get("onExitCodes", {}).get("values", ()) for rule in rules if rule["action"] == "FailJob"
            )


@pytest.mark.parametrize(("overlay", "nodes"), [("train-single", 1), ("train-multi", 2)])
def test_a_run_resumes_has_time_to_save_and_stops_at_once_at_a_user_error(overlay, nodes):
    """An eviction costs at most the steps since the last checkpoint; a wrong flag is not retried."""
    template = one(objects(overlay), "CronJob", "train")["spec"]
    assert template["suspend"] is True  # a run starts by `kubectl create job`
    job = template["jobTemplate"]["spec"]
    spec = job["template"]["spec"]
    run, check = container(job["template"], "train"), container(job["template"], "check-run")
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", nodes, nodes)
    assert environment(run)["NNODES"] == f"{nodes}"
    # the name of the Job is the folder of the run, and part of the host name of its first pod
    fields = {entry["name"]: entry.get("valueFrom") for entry in run["env"]}
    assert fields["RUN"] == {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    assert (
        next(entry["value"] for entry in run["env"] if entry["name"] == "MASTER_ADDR")
        == f"$(RUN)-0.{spec['subdomain']}"
    )
    assert job["backoffLimit"] == 6 * nodes  # a failed node fails the pods of all
    service = one(objects(overlay), "Service", "train")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    assert spec["terminationGracePeriodSeconds"] > SHUTDOWN_SECONDS
    assert run["args"][-2:] == ["--resume", "auto"]
    assert "--save-total-limit" in run["args"]
    assert check["args"] == [*run["args"], "--dry-run"]
    assert check["env"] == run["env"]
    assert run["resources"]["limits"]["nvidia.com/gpu"] == run["args"][run["args"].index("--num-gpus") + 1]
    stops = {
        rule["onExitCodes"]["containerName"]: rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"][1:]
    }
    assert stops == {"check-run": [1, 2], "train": [2]}


@pytest.mark.parametrize(
    ("name", "kind", "main", "domain"),
    [("jobset", "JobSet", "train", "train"), ("trainjob", "TrainingRuntime", "node", "$(RUN)")],
)
def test_jobset_and_trainjob_run_the_same_command_under_the_name_of_the_run(name, kind, main, domain, used):
    plain = one(objects("train-multi"), "CronJob", "train")["spec"]["jobTemplate"]["spec"]["template"]
    assert not [each for each in used(name) if (each["kind"], each["metadata"]["name"]) == ("CronJob", "train")]
    run = one(used(name), kind, "first")
    copy = pod_template(run)
    assert container(copy, main)["args"] == container(plain, "train")["args"]
    for each in (container(copy, main), container(copy, "check-run")):
        variables = {entry["name"]: entry for entry in each["env"]}
        label = "metadata.labels['jobset.sigs.k8s.io/jobset-name']"
        assert variables["RUN"]["valueFrom"] == {"fieldRef": {"fieldPath": label}}
        assert variables["MASTER_ADDR"]["value"] == f"$(RUN)-node-0-0.{domain}"
    assert copy["metadata"]["labels"] == plain["metadata"]["labels"]
    rules = (run["spec"] if kind == "JobSet" else run["spec"]["template"]["spec"])["failurePolicy"]["rules"]
    assert {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]} in rules
    if kind != "JobSet":
        assert one(used(name), "TrainJob", "first")["spec"]["runtimeRef"]["name"] == "first"


def test_a_run_joins_its_kueue_queue_and_only_kueue_suspends_it(used):
    """An apply that sets `suspend` would stop a run that Kueue has admitted."""
    run = one(used("kueue"), "CronJob", "train")["spec"]["jobTemplate"]
    queue = one(used("kueue"), "LocalQueue", "train")["metadata"]["name"]
    assert run["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue
    assert "suspend" not in run["spec"]
    jobset = one(used("kueue-jobset"), "JobSet", "first")
    assert jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue
    assert "suspend" not in jobset["spec"]
