# The agent as an image: Python, the packages of .docker/requirements.lock by their hashes, and tokenward. No pip, no
# compiler. Nothing of it needs a shell at run time, a writable root or a user database.
#
#   docker build -t tokenward .        or        buildah bud --format docker -t tokenward .
#
# Any base will do that has Python 3.11, its venv module, the CAs' certificates and libstdc++.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE} AS build
# Where packages come from, for builds without the network: --build-arg PIP_NO_INDEX=1 --build-arg PIP_FIND_LINKS=/wheels
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1 PIP_ONLY_BINARY=:all: PIP_REQUIRE_VIRTUALENV=1
WORKDIR /build
RUN python3 -m venv /build/tools && python3 -m venv --without-pip /opt/tokenward
COPY .docker/ .docker/
RUN tools/bin/pip --python /opt/tokenward/bin/python install --require-hashes -r .docker/requirements.lock \
 && tools/bin/pip install --require-hashes -r .docker/build.lock
COPY pyproject.toml README.md LICENSE ./
COPY agent/ agent/
# No dependency is resolved here: all are there, and one that the lock lacks is found by `pip check`.
RUN tools/bin/pip wheel --no-deps --no-build-isolation --no-index --wheel-dir dist . \
 && tools/bin/pip --python /opt/tokenward/bin/python install --no-deps --no-index dist/*.whl \
 && tools/bin/pip --python /opt/tokenward/bin/python check \
 && /opt/tokenward/bin/python -c 'import tokenward.daemon' \
 && mkdir -p root/run/tokenward root/lib/tokenward root/log/tokenward \
 && chmod 0700 root/lib/tokenward root/log/tokenward

FROM ${BASE}
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tokenward" \
      org.opencontainers.image.description="Short-lived, scoped credentials for attested local processes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/tokenward /opt/tokenward
# Of the agent's own: its socket, what operators revoked, the audit file. In a pod volumes are mounted there.
COPY --from=build --chown=65532:65532 /build/root/run/ /run/
COPY --from=build --chown=65532:65532 /build/root/lib/ /var/lib/
COPY --from=build --chown=65532:65532 /build/root/log/ /var/log/
ENV PATH=/opt/tokenward/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
WORKDIR /
STOPSIGNAL SIGTERM
# Ready or not is for whoever sends it work; a container is replaced for being stuck, not for a vault that is away.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 CMD ["tokenward", "health", "--live"]
ENTRYPOINT ["tokenward"]
CMD ["run"]
