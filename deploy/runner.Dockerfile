# syntax=docker/dockerfile:1
# A runner.   docker build -f deploy/runner.Dockerfile -t granatum-runner .
# torch's own wheel brings CUDA; the host brings the driver.
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

# Triton compiles its launchers with the C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

RUN --mount=type=bind,target=/source,rw \
    cd /source && python -m pip install --quiet --constraint constraints.txt ".[runner]"

RUN useradd --system --uid 10001 --create-home granatum && install -d -o granatum /adapters /cache
USER granatum

EXPOSE 7071
ENTRYPOINT ["granatum"]
CMD ["runner"]
