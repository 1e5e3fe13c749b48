"""What reaches the API from outside the cluster: paths, host names, and whose usage is recorded where."""

import pytest
from manifest_uses import SETTINGS
from manifests import arguments, container, one, pod_template

HOST = SETTINGS["HOST"]


def command(manifests, name):
    """Arguments of a container with its variables, as the kubelet expands them."""
    main = container(pod_template(one(manifests, "Deployment", name)), "api" if name == "embeddings" else name)
    return arguments(main)


@pytest.mark.parametrize("use", ["gateway", "ingress-embeddings", "gateway-embeddings", "ingress-no-keys"])
def test_the_api_and_the_page_accept_the_name_under_which_they_are_reached(use, used):
    """Without keys, or without a password, they reject other names."""
    manifests = used(use)
    names = {each["metadata"]["name"] for each in manifests if each["kind"] == "Deployment"} & {"web", "web-streamlit"}
    assert len(names) == (2 if use == "ingress-no-keys" else 1)
    for name in ("api", *names):
        assert f"--allowed-host={HOST}" in command(manifests, name)
    assert ("--insecure-no-auth" in command(manifests, "api")) == (use == "ingress-no-keys")


def test_embeddings_have_their_path_under_the_host(used):
    (rule,) = one(used("ingress-embeddings"), "Ingress", "api")["spec"]["rules"]
    paths = {each["path"]: each["backend"]["service"]["name"] for each in rule["http"]["paths"]}
    assert paths == {"/v1": "api", "/v1/embeddings": "embeddings"}
    rules = one(used("gateway-embeddings"), "HTTPRoute", "api")["spec"]["rules"]
    paths = {each["matches"][0]["path"]["value"]: each["backendRefs"][0]["name"] for each in rules}
    assert paths == {"/v1": "api", "/v1/embeddings": "embeddings"}
    for use in ("ingress-embeddings", "gateway-embeddings"):
        (expression,) = one(used(use), "NetworkPolicy", "from-outside")["spec"]["podSelector"]["matchExpressions"]
        pod = pod_template(one(used(use), "Deployment", "embeddings"))
        assert pod["metadata"]["labels"][expression["key"]] in expression["values"]


def test_each_pod_records_its_usage_in_a_folder_of_its_own_on_a_claim_that_stays(used):
    """Two pods serve during a rollout, and a server locks its folder."""
    manifests = used("usage")
    for name in ("api", "embeddings"):
        pod = pod_template(one(manifests, "Deployment", name))["spec"]
        main = next(each for each in pod["containers"] if each["name"] == "api")
        assert "--usage-dir=/usage/$(POD_NAME)" in main["args"]
        (variable,) = (each for each in main["env"] if each["name"] == "POD_NAME")
        assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
        (mount,) = (each for each in main["volumeMounts"] if each["mountPath"] == "/usage")
        assert not mount.get("readOnly")
        (volume,) = (each for each in pod["volumes"] if each["name"] == mount["name"])
        claim = volume["persistentVolumeClaim"]["claimName"]
        assert one(manifests, "PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"]


def test_users_sign_in_and_their_conversations_and_ratings_are_on_a_claim_that_stays(used):
    manifests = used("page-conversations")
    for name in ("web", "web-streamlit"):
        pod = pod_template(one(manifests, "Deployment", name))["spec"]
        (main,) = pod["containers"]
        variables = {each["name"]: each.get("value") for each in main["env"]}
        mounts = {each["mountPath"]: each for each in main["volumeMounts"]}
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert len(volumes) == len(pod["volumes"])
        assert variables["CONVERSATIONS"] == "server"
        for folder in (variables["PAGE_STATE_DIR"], variables["FEEDBACK_DIR"].rpartition("/")[0]):
            assert not mounts[folder].get("readOnly")
            claim = volumes[mounts[folder]["name"]]["persistentVolumeClaim"]["claimName"]
            assert one(manifests, "PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"]
        users, _, key = variables["PAGE_USERS_FILE"].rpartition("/")
        assert (volumes[mounts[users]["name"]]["secret"], key) == ({"secretName": "page-users"}, "users")
