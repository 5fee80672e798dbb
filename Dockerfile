# qhub in a container, for a CPU:
#   docker build -t qhub .
# or for CUDA 12.8 (the driver comes from the host: docker run --gpus all):
#   docker build -t qhub:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#
#   docker run -p 8000:8000 -v qhub:/home/qhub/.qhub qhub                 # serves; the home is the volume
#   docker run --rm -v qhub:/home/qhub/.qhub qhub base add smollm2 HuggingFaceTB/SmolLM2-135M-Instruct
#   docker run --rm -v qhub:/home/qhub/.qhub qhub key create              # before it is reachable for others

ARG PYTHON=3.12
FROM python:${PYTHON}-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adapterhub_local adapterhub_local
COPY serve serve
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /build/dist

FROM python:${PYTHON}-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=sign,parquet,s3,redis,otel
# the server's kernels are compiled for the processor at hand when it starts first
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 qhub && install -d -o qhub -g qhub /home/qhub/.qhub /home/qhub/.cache
COPY constraints.txt /build/constraints.txt
RUN pip install --no-cache-dir -c /build/constraints.txt --index-url ${TORCH_INDEX} --extra-index-url https://pypi.org/simple torch
COPY --from=wheel /build/dist /build/dist
RUN pip install --no-cache-dir -c /build/constraints.txt "$(echo /build/dist/*.whl)[${EXTRAS}]" && rm -r /build
USER qhub
WORKDIR /home/qhub
ENV QHUB_HOME=/home/qhub/.qhub
VOLUME /home/qhub/.qhub
EXPOSE 8000
# /ready says 503 until the base is loaded; a base may take its time
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=4 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["qhub"]
CMD ["serve", "--host", "0.0.0.0"]
