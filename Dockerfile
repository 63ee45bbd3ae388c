# The proxy as an image: dependencies as locked, nothing else, no root.
#
#   docker build -t dicomproxy .
#   docker run -v ./dicomproxy.yaml:/etc/dicomproxy/dicomproxy.yaml:ro \
#     -v dicomproxy:/var/cache/dicomproxy -p 11112:11112 dicomproxy

FROM python:3.12-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /venv
WORKDIR /src
# Dependencies change seldom, so they come first: a change of the code reuses this layer.
COPY requirements.lock ./
RUN /venv/bin/pip install --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY dicomproxy ./dicomproxy
RUN /venv/bin/pip install --no-deps . && /venv/bin/pip uninstall --yes pip

FROM python:3.12-slim
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin dicomproxy \
 && install -d -o dicomproxy -g dicomproxy -m 0750 /var/cache/dicomproxy /etc/dicomproxy
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
VOLUME /var/cache/dicomproxy
EXPOSE 11112 8080
# Where web.host and web.port differ from their defaults, so must this.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/health/ready', timeout=4)"]
# Longer than proxy.shutdown_grace is what "docker stop" needs: --time 60.
STOPSIGNAL SIGTERM
ENTRYPOINT ["dicomproxy"]
CMD ["serve", "--config", "/etc/dicomproxy/dicomproxy.yaml"]
