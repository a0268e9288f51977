# For the GPUs of a cluster:  docker build -t namr-dist .    (docs/slurm.md has Apptainer and enroot)
FROM python:3.12-slim-bookworm

# Triton compiles with the machine's C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY . /opt/namr-dist
RUN DS_BUILD_OPS=0 pip install --no-cache-dir '/opt/namr-dist[gpu]'

CMD ["namr", "doctor"]
