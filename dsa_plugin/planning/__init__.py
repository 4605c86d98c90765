"""Sizes, times and costs of a deployment, computed from config.json alone. Neither torch nor GPU.

model.py           ModelShape: the numbers of config.json that matter here
sizes.py           parameters, weight bytes, cache bytes
gpus.py            published memory, bandwidth and peaks of the GPUs we know
deployment.py      a model on GPUs: what each holds, how many tokens and requests fit
weight_kernels.py  what hosts multiply weights in, where it is not the weights' own precision
work.py            FLOPs and bytes of one layer, op by op
forms.py           which of an op's kernels does some work
measured.py        times of kernels that were measured; h100.json: those of an H100
roofline.py        from work to seconds, by measured kernels or published peaks
cost.py            dollars a million tokens, beside what DeepSeek published
plan.py            all of it for one deployment
"""
