# syntax=docker/dockerfile:1
# A router: no torch.   docker build -f deploy/router.Dockerfile -t granatum-router .
FROM python:3.12-slim

ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1

RUN --mount=type=bind,target=/source,rw \
    cd /source && python -m pip install --quiet --constraint constraints.txt ".[router]"

# A volume takes the ownership of the directory that it covers.
RUN useradd --system --uid 10001 granatum && install -d -o granatum /adapters /keys
USER granatum

EXPOSE 7070
ENTRYPOINT ["granatum"]
CMD ["router"]
