#!/usr/bin/env bash
# The startup script of every TPU VM: installs mtp_jax, fetches the corpus, and trains as
# a service. launch/tpu_vm.sh hands it over, with a bucket and the options of train in
# the metadata of the VM.
set -euo pipefail

metadata() {
    curl --silent --fail --header 'Metadata-Flavor: Google' \
        "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}

bucket=$(metadata mtp-bucket)
home=/opt/mtp_jax
mkdir -p "$home" /data
export HOME=/root UV_INSTALL_DIR=/usr/local/bin

# The image has Python 3.10; uv brings one of its own.
command -v uv || curl --silent --show-error --location --fail \
    https://astral.sh/uv/install.sh | sh
gcloud storage cat "$bucket/code.tar.gz" | tar --extract --gzip --directory="$home"
cd "$home"
[[ -d .venv ]] || uv venv --python 3.12 .venv
uv pip install --python .venv/bin/python -r requirements.txt
uv pip install --python .venv/bin/python '.[tpu,gcs]'
gcloud storage rsync --recursive "$bucket/data" /data

# `exec` makes Python the service's process: SIGTERM at a shutdown is Python's.
cat >"$home/run.sh" <<RUN
#!/usr/bin/env bash
cd $home
exec .venv/bin/python -m mtp_jax train $(metadata mtp-train)
RUN

cat >/etc/systemd/system/mtp-jax.service <<UNIT
[Unit]
Description=mtp_jax train
After=network-online.target
StartLimitIntervalSec=0

[Service]
ExecStart=/bin/bash $home/run.sh
Restart=on-failure
RestartSec=10
# Bad input stays wrong.
RestartPreventExitStatus=2
KillMode=mixed
TimeoutStopSec=300
UNIT
systemctl daemon-reload
systemctl restart mtp-jax
