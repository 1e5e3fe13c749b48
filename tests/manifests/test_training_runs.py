"""Jobs end for good, and a training run resumes, saves and stops as k8s/README.md says. Traps K6 and K7."""

import pytest
from manifests import container, environment, objects, one, pod_template

from entrypoints.training.launch import SHUTDOWN_SECONDS


def test_every_job_ends_for_good_and_is_cleared_away(every):
    """K7."""
    jobs = [thing["spec"] for thing in every if thing["kind"] == "Job"]
    jobs += [thing["spec"]["jobTemplate"]["spec"] for thing in every if thing["kind"] == "CronJob"]
    assert len(jobs) >= 25
    for job in jobs:
        assert job["backoffLimit"] <= 6 and job["ttlSecondsAfterFinished"] > 0
        assert job["template"]["spec"]["restartPolicy"] == "Never"
        if job["backoffLimit"]:
            rules = job["podFailurePolicy"]["rules"]
            assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
            assert any(
                2 in rule.get("onExitCodes", {}).get("values", ()) for rule in rules if rule["action"] == "FailJob"
            )


@pytest.mark.parametrize(("overlay", "machines"), [("train-single", 1), ("train-multi", 2)])
def test_a_run_resumes_saves_in_its_grace_and_stops_at_once_for_a_mistake(overlay, machines):
    """K6, K7."""
    job = one(objects(overlay), "Job", "train")["spec"]
    spec = job["template"]["spec"]
    run, check = container(job["template"], "train"), container(job["template"], "check-run")
    assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", machines, machines)
    assert environment(run)["NNODES"] == f"{machines}"
    assert environment(run)["MASTER_ADDR"] == f"train-0.{spec['subdomain']}"
    service = one(objects(overlay), "Service", "train")["spec"]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
    assert spec["terminationGracePeriodSeconds"] > SHUTDOWN_SECONDS
    assert run["args"][-2:] == ["--resume", "auto"] and "--save-total-limit" in run["args"]
    assert check["args"] == [*run["args"], "--dry-run"] and check["env"] == run["env"]
    assert run["resources"]["limits"]["nvidia.com/gpu"] == int(run["args"][run["args"].index("--num-gpus") + 1])
    stops = {
        rule["onExitCodes"]["containerName"]: rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"][1:]
    }
    assert stops == {"check-rows": [1, 2], "check-run": [1, 2], "train": [2]}


def test_jobset_and_trainjob_run_what_the_job_runs(used):
    plain = one(objects("train-multi"), "Job", "train")["spec"]["template"]
    for name, kind, main in (("jobset", "JobSet", "train"), ("trainjob", "TrainingRuntime", "node")):
        assert not [thing for thing in used(name) if thing["kind"] == "Job" and thing["metadata"]["name"] == "train"]
        copy = pod_template(one(used(name), kind, "train"))
        assert container(copy, main)["args"] == container(plain, "train")["args"]
        assert environment(container(copy, main))["MASTER_ADDR"] == "train-node-0-0.train"
        assert environment(container(copy, "check-run"))["MASTER_ADDR"] == "train-node-0-0.train"
        assert copy["metadata"]["labels"] == plain["metadata"]["labels"]


def test_the_queue_of_kueue_holds_the_run(used):
    job = one(used("kueue"), "Job", "train")
    assert (
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        == one(used("kueue"), "LocalQueue", "train")["metadata"]["name"]
    )
    assert job["spec"]["suspend"] is True
