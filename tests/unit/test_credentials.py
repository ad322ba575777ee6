"""What a process that works on models may know of the environment, and what it may not."""

import pytest

from release_guard.credentials import is_secret, without_secrets


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "HF_TOKEN_PATH",
        "HUGGING_FACE_HUB_TOKEN",
        "HF_OIDC_ID_TOKEN",
        "HF_OIDC_RESOURCE",
        "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
        "ACTIONS_ID_TOKEN_REQUEST_URL",
        "ACTIONS_RUNTIME_TOKEN",
        "ACTIONS_CACHE_URL",
        "RELEASE_GUARD_SIGNING_KEY",
        "RELEASE_GUARD_KEY_PASSWORD",
        "GITHUB_TOKEN",
        "GITHUB_ENV",  # a file: whoever writes to it sets variables of later steps
        "GITHUB_PATH",
        "GH_TOKEN",
        "INPUT_HF-TOKEN",
        "GIT_ASKPASS",
        "GIT_CONFIG_VALUE_0",
        "SSH_AUTH_SOCK",
        "SSH_ASKPASS",
        "NETRC",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_CLIENT_SECRET",
        "WANDB_API_KEY",
        "OPENAI_API_KEY",
        "SOMEBODYS_API_KEY_2",
        "MYAPIKEY",
        "NPM_CONFIG__AUTH",
        "TWINE_PASSWORD",
        "PGPASSFILE",
        "DB_PASSWD",
        "SERVICE_SECRET_V2",
        "KUBECONFIG",
        "SLACK_WEBHOOK_URL",
        "SENTRY_DSN",
        "lower_case_token",
    ],
)
def test_names_that_look_like_secrets(name: str) -> None:
    assert is_secret(name, "/some/where")


@pytest.mark.parametrize(
    "value",
    [
        "-----BEGIN PRIVATE KEY-----\nMIG",
        "http://user:tok@proxy.example:8080",
        "postgresql://user:secret@db/x",
        "https://:secret@packages.example/simple",
        "hf_abcdefghijklmnopqrst",
        "Authorization: bearer hf_abcdefghijklmnopqrst",
        "ghp_0123456789abcdefABCD",
        "github_pat_0123456789abcdefABCD",
        "sk-0123456789abcdefABCD",
        "AKIA0123456789ABCDEF",
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJyZXBvIn0.c2ln",
    ],
)
def test_values_that_look_like_secrets(value: str) -> None:
    assert is_secret("PLAIN", value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH", "/usr/bin:/bin"),
        ("HOME", "/home/alice"),
        ("PWD", "/home/alice/models"),
        ("LANG", "en_GB.UTF-8"),
        ("PYTHONPATH", "/opt/site"),
        ("PYTHONHASHSEED", "0"),
        ("VIRTUAL_ENV", "/opt/venv"),
        ("LD_LIBRARY_PATH", "/usr/local/cuda/lib64"),
        ("CUDA_VISIBLE_DEVICES", "0,1"),
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        ("OMP_NUM_THREADS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HOME", "/data/hf"),
        ("HF_HUB_CACHE", "/data/hf/hub"),
        ("HF_HUB_OFFLINE", "1"),
        ("HF_ENDPOINT", "https://hub.example"),
        ("HTTPS_PROXY", "http://proxy.example:8080"),
        ("MASTER_ADDR", "10.0.0.1"),
        ("LOCAL_RANK", "0"),
        ("RAY_ADDRESS", "10.0.0.1:6379"),
        ("SSL_CERT_FILE", "/etc/ssl/ca.pem"),
        ("TMPDIR", "/tmp"),  # noqa: S108
        ("MKL_CBWR", "COMPATIBLE"),
    ],
)
def test_what_models_are_worked_on_with_stays(name: str, value: str) -> None:
    assert without_secrets({name: value}) == {name: value}
