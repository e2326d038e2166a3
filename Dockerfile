# nnunet-autoreg and nnU-Net in one image. Research software, no medical device.
#
#     docker build -t nnunet-autoreg .
#     docker run --rm --gpus all --ipc=host -v /data:/data -u $(id -u):$(id -g) \
#         nnunet-autoreg autoreg_pretrain -i /data/scans --name brain
#
# /data holds nnU-Net's three folders. --ipc=host gives loader processes the shared memory they need.
FROM python:3.12-slim

# torch.compile needs a C++ compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/nnunet-autoreg
COPY pyproject.toml setup.py README.md LICENSE ./
COPY nnunet_autoreg nnunet_autoreg
COPY trainers trainers
COPY planners planners
RUN pip install --no-cache-dir .

# A user that -u names has no home. Triton, matplotlib and huggingface_hub keep their caches in it.
ENV nnUNet_raw=/data/nnUNet_raw \
    nnUNet_preprocessed=/data/nnUNet_preprocessed \
    nnUNet_results=/data/nnUNet_results \
    HOME=/tmp

WORKDIR /data
CMD ["autoreg_doctor"]
