# Any Python >= 3.11 image with glibc: --build-arg BASE=python:3.13-slim
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Dependencies first: this layer changes with the pins only. Wheels only: the image has no compiler.
# The environment has no pip of its own, the build image's pip fills it.
COPY requirements.txt requirements-build.txt ./
RUN python -m venv --without-pip /opt/sluice \
 && pip --python /opt/sluice/bin/python install --require-hashes --no-deps --only-binary :all: -r requirements.txt \
 && pip install --require-hashes --no-deps --only-binary :all: -r requirements-build.txt
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && pip --python /opt/sluice/bin/python install --no-deps /wheels/*.whl

FROM ${BASE}
LABEL org.opencontainers.image.title="Sluice" \
      org.opencontainers.image.description="A reverse proxy for chat completions" \
      org.opencontainers.image.licenses="MIT"
# MALLOC: glibc gives a freed megabyte back to the kernel at once and takes it anew for the next large
# body; faulting those pages in again is a third of what such a request costs.
ENV MALLOC_MMAP_THRESHOLD_=8388608 MALLOC_TRIM_THRESHOLD_=33554432
# DONTWRITEBYTECODE: pip has compiled everything, and the root file system may be read-only.
ENV PATH=/opt/sluice/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY --from=build /opt/sluice /opt/sluice
COPY config.yaml /etc/sluice/config.yaml
WORKDIR /etc/sluice
# Numeric, so that Kubernetes' runAsNonRoot can see that it is not root.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# http.client takes no proxy from the environment, urllib would. Keep port 8080 in a config of your own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import http.client, sys; c = http.client.HTTPConnection('127.0.0.1', 8080, timeout=4); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
# A container that listens on its own loopback is reached by nobody: --host beats the config's
# listen.host, so a mounted file need not know where it runs. In the entry point, so that it also
# holds for arguments of your own; `docker run … check --config FILE` works as well.
ENTRYPOINT ["sluice", "--host", "0.0.0.0"]
CMD ["--config", "/etc/sluice/config.yaml"]
