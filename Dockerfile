# For the GPUs of a cluster:  docker build -t namr-dist .    (docs/slurm.md has Apptainer and enroot)
#
# A tag can be moved to another image, a digest cannot; `docker buildx imagetools inspect IMAGE` prints today's:
#     docker build --build-arg BASE=python:3.12.14-slim-bookworm@sha256:DIGEST -t namr-dist .
ARG BASE=python:3.12.14-slim-bookworm
FROM $BASE

# Triton compiles with the machine's C compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# As in the Makefile: the versions and hashes of constraints/, first what builds packages.
COPY constraints /opt/namr-dist/constraints
RUN pip install --no-cache-dir --require-hashes --no-deps -r /opt/namr-dist/constraints/build.txt \
    && DS_BUILD_OPS=0 pip install --no-cache-dir --require-hashes --no-deps --no-build-isolation \
        -r /opt/namr-dist/constraints/gpu.txt
COPY . /opt/namr-dist
RUN pip install --no-cache-dir --no-deps --no-build-isolation /opt/namr-dist

CMD ["namr", "doctor"]
