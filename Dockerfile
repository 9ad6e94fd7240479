# Two images of one environment: `worker` is the command line (and MLflow, whose server it has),
# `bento` is the prediction service. It runs from the same code, and serves the model that the ledger names.

FROM python:3.11.15-slim-bookworm AS packages
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
COPY requirements.lock /tmp/
RUN pip install --require-hashes --only-binary :all: --requirement /tmp/requirements.lock

FROM python:3.11.15-slim-bookworm AS base
RUN useradd --uid 10001 --user-group --home-dir /tmp --no-create-home --shell /usr/sbin/nologin fraud \
    && install --directory --owner fraud --group fraud /var/lib/fraud
COPY --from=packages /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# The code stays beside its notebooks: a retrain and the dashboard run them.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY fraud_nb fraud_nb
COPY nbs nbs
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation --editable . \
    && python -m compileall -q fraud_nb
# Nothing is written but under /tmp and, where a volume is mounted, /var/lib/fraud. Features are compiled anew in each
# container, at the first record (some 20 s): numba's cache does not see every change, so none outlives its code.
ENV HOME=/tmp NUMBA_CACHE_DIR=/tmp/numba BENTOML_HOME=/tmp/bentoml BENTOML_DO_NOT_TRACK=True FRAUD_HOME=/var/lib/fraud
USER 10001:10001

FROM base AS worker
ENTRYPOINT ["fraud"]

FROM base AS bento
ENTRYPOINT ["bentoml"]
CMD ["serve", "fraud_nb.apps.service:FraudService", "--host", "0.0.0.0", "--port", "3000"]
