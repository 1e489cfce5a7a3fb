# The command lit-transdiff with the tested versions of constraints.txt, for GPUs or CPUs:
#   docker build --tag lit-transdiff .
#   docker build --tag lit-transdiff:cpu --build-arg DEVICE=cpu .
# The image for GPUs has CUDA's libraries; the machine has the driver and NVIDIA's container toolkit.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
ARG DEVICE=gpu
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
RUN python -m venv /opt/venv
COPY requirements.txt constraints.txt ./
# That index has PyTorch without CUDA, and not all versions of other packages: those come with the second step.
RUN case "$DEVICE" in \
      gpu) ;; \
      cpu) /opt/venv/bin/pip install --no-deps --constraint constraints.txt \
             --index-url "$CPU_INDEX" torch torchvision ;; \
      *) echo "DEVICE: got '$DEVICE'; allowed: gpu, cpu" && exit 1 ;; \
    esac
RUN /opt/venv/bin/pip install --constraint constraints.txt --requirement requirements.txt
COPY . .
RUN /opt/venv/bin/pip install --no-deps .

FROM python:${PYTHON}-slim
ARG USER_ID=1000
# Triton and torch.compile call a compiler, of any version.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid "$USER_ID" user \
    && install --directory --owner user /workspace
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER $USER_ID
WORKDIR /workspace
ENTRYPOINT ["lit-transdiff"]
CMD ["--help"]
