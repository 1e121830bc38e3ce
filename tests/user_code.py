"""Pieces of code as users of transformers write it, run on both libraries; `test_user_code` compares what they leave.

A piece is source that leaves `result`. It finds `lib`, the library; `config`; `model`, `classifier` and `backbone`, in
both with the same weights; `tokens` int64 (2, 16); `processor`, with Pillow; `image`; `folder`, an empty one; `saved`,
one with the model and the processor; and `torch`, `np`, `nn`.
"""

# ruff: noqa: E501  # a piece is one line, as long as it may be

PIECES: dict[str, dict[str, str]] = {}

PIECES["configuration"] = {
    "widths that make no model": "c = lib.ImageGPTConfig(n_embd=37)\nc.save_pretrained(folder)\nresult = lib.ImageGPTConfig.from_pretrained(folder).n_embd",
    "arguments of other models": "c = lib.ImageGPTConfig(type_vocab_size=16, gradient_checkpointing=False, n_ctx=4)\nresult = c.type_vocab_size, c.gradient_checkpointing, c.to_dict()['n_ctx']",
    "arguments of every configuration": "c = lib.ImageGPTConfig(return_dict=False, output_hidden_states=True, output_attentions=True, chunk_size_feed_forward=5, architectures=['A'], id2label={0: 'label'}, problem_type='regression')\nresult = c.return_dict, c.output_hidden_states, c.output_attentions, c.chunk_size_feed_forward, c.architectures, c.id2label, c.problem_type",
    "numbers of classes as strings": "result = lib.ImageGPTConfig(id2label={'0': 'a', '1': 'b'}, label2id={'a': '0', 'b': '1'}).id2label",
    "the keyword of from_pretrained": "config.save_pretrained(save_directory=folder)\nresult = lib.ImageGPTConfig.from_pretrained(pretrained_model_name_or_path=folder).n_embd",
    "a folder within": "config.save_pretrained(folder / 'a')\nresult = lib.ImageGPTConfig.from_pretrained(folder, subfolder='a').n_embd",
    "a field is set": "config.n_layer = 3\nresult = config.n_layer, config.num_hidden_layers",
    "another name of a field is set": "config.num_hidden_layers = 3\nresult = config.n_layer",
    "fields are set one after the other": "config.n_embd = 18\nconfig.n_head = 3\nresult = lib.ImageGPTModel(config).wte.weight.shape",
    "update": "config.update({'use_cache': False, 'n_inner': 7})\nresult = config.use_cache, config.n_inner",
    "an argument of one's own": "result = lib.ImageGPTConfig(my_note='a').my_note",
    "an attribute of one's own": "config.my_note = [1]\nresult = config.my_note, config.to_dict()['my_note']",
    "an attribute of one's own in a file": "config.my_note = 'a'\nconfig.save_pretrained(folder)\nresult = lib.ImageGPTConfig.from_pretrained(folder).my_note",
    "a key of one's own in a file": "import json\n(folder / 'config.json').write_text(json.dumps({'model_type': 'imagegpt', 'extra': {'a': 1}}))\nconfig = lib.ImageGPTConfig.from_pretrained(folder)\nconfig.save_pretrained(folder)\nresult = json.loads((folder / 'config.json').read_text())['extra']",
    "model_type": "result = config.model_type, lib.ImageGPTConfig.model_type",
    "classes by number": "config.num_labels = 5\nresult = config.num_labels, config.id2label, config.label2id",
    "classes by name": "config.id2label = {0: 'a', 1: 'b', 2: 'c'}\nresult = config.num_labels",
    "names and numbers of classes": "c = lib.ImageGPTConfig(id2label={0: 'a', 1: 'b'}, label2id={'a': 0, 'b': 1})\nresult = c.num_labels, c.id2label, c.label2id",
    "to_dict and back": "again = lib.ImageGPTConfig(**config.to_dict())\nresult = again.to_dict() == config.to_dict(), again.n_embd",
    "from_dict": "result = lib.ImageGPTConfig.from_dict({'n_layer': 2, 'n_embd': 8}).n_layer",
    "from_dict with changes": "result = lib.ImageGPTConfig.from_dict({'n_layer': 2}, output_attentions=True).output_attentions",
    "unused arguments are given back": "config.save_pretrained(folder)\nc, left = lib.ImageGPTConfig.from_pretrained(folder, use_cache=False, foo=1, return_unused_kwargs=True)\nresult = c.use_cache, left",
    "to_json_string": "import json\nresult = json.loads(config.to_json_string())['n_embd']",
    "all of to_json_string": "import json\nresult = json.loads(config.to_json_string(use_diff=False))['n_inner']",
    "to_json_file and back": "config.to_json_file(folder / 'c.json')\nresult = lib.ImageGPTConfig.from_json_file(folder / 'c.json').n_embd",
    "defaults of every configuration": "result = config.is_encoder_decoder, config.architectures, config.chunk_size_feed_forward",
    "dtype": "result = lib.ImageGPTConfig(dtype='float16').dtype",
    "use_return_dict": "result = config.use_return_dict",
    "get_text_config": "result = config.get_text_config().vocab_size",
    "a copy": "import copy\nother = copy.deepcopy(config)\nother.n_layer = 7\nresult = config.n_layer, other.n_layer",
    "a class of one's own": "class Mine(lib.ImageGPTConfig):\n    def __init__(self, extra=1, **rest):\n        super().__init__(**rest)\n        self.extra = extra\nMine(extra=3, n_layer=2).save_pretrained(folder)\nresult = Mine.from_pretrained(folder).extra, Mine.from_pretrained(folder).n_layer",
    "the model sees what is set": "model.config.output_hidden_states = True\nresult = len(model(tokens).hidden_states)",
    "a misspelt argument": "result = lib.ImageGPTConfig(n_layers=3).n_layer",
}

PIECES["loading and saving"] = {
    "by keywords": "model.save_pretrained(save_directory=folder)\nresult = lib.ImageGPTModel.from_pretrained(pretrained_model_name_or_path=folder).wte.weight",
    "from no file": "m = lib.ImageGPTForCausalImageModeling.from_pretrained(None, config=model.config, state_dict=model.state_dict())\nresult = m(tokens).logits",
    "a width that makes no model": "try:\n    lib.ImageGPTModel(lib.ImageGPTConfig(n_embd=37))\nexcept ValueError:\n    result = True",
    "round trip": "model.save_pretrained(folder)\nresult = lib.ImageGPTForCausalImageModeling.from_pretrained(folder)(tokens).logits",
    "files": "model.save_pretrained(folder)\nresult = {'config.json', 'model.safetensors'} <= {f.name for f in folder.iterdir()}",
    "a string as the folder": "model.save_pretrained(str(folder))\nresult = lib.ImageGPTModel.from_pretrained(str(folder)).config.n_embd",
    "safe_serialization": "model.save_pretrained(folder, safe_serialization=True)\nresult = (folder / 'model.safetensors').is_file()",
    "state_dict": "state = {k: 2 * v for k, v in model.state_dict().items()}\nmodel.save_pretrained(folder, state_dict=state)\nresult = lib.ImageGPTForCausalImageModeling.from_pretrained(folder).lm_head.weight",
    "another process than the main one": "model.save_pretrained(folder / 'x', is_main_process=False)\nresult = (folder / 'x' / 'model.safetensors').is_file()",
    "shards": "model.save_pretrained(folder, max_shard_size='10KB')\nm = lib.ImageGPTForCausalImageModeling.from_pretrained(folder)\nresult = (folder / 'model.safetensors.index.json').is_file(), m(tokens).logits",
    "torch_dtype": "result = lib.ImageGPTModel.from_pretrained(saved, torch_dtype=torch.float16).dtype",
    "dtype": "result = lib.ImageGPTModel.from_pretrained(saved, dtype='bfloat16').dtype",
    "low_cpu_mem_usage": "result = lib.ImageGPTModel.from_pretrained(saved, low_cpu_mem_usage=True).wte.weight",
    "trust_remote_code": "result = lib.ImageGPTModel.from_pretrained(saved, trust_remote_code=False).wte.weight",
    "use_safetensors": "result = lib.ImageGPTModel.from_pretrained(saved, use_safetensors=True).wte.weight",
    "local_files_only": "result = lib.ImageGPTModel.from_pretrained(saved, local_files_only=True).wte.weight",
    "cache_dir and token": "result = lib.ImageGPTModel.from_pretrained(saved, cache_dir=folder, token=None, revision='main').wte.weight",
    "subfolder": "result = lib.ImageGPTModel.from_pretrained(saved.parent, subfolder=saved.name).wte.weight",
    "attn_implementation": "result = lib.ImageGPTModel.from_pretrained(saved, attn_implementation='eager')(tokens).last_hidden_state",
    "output_loading_info": "m, info = lib.ImageGPTForCausalImageModeling.from_pretrained(saved, output_loading_info=True)\nresult = sorted(info['missing_keys']), sorted(info['unexpected_keys'])",
    "what a new head lacks": "m, info = lib.ImageGPTForImageClassification.from_pretrained(saved, output_loading_info=True)\nresult = sorted(info['missing_keys']), sorted(info['unexpected_keys'])",
    "a field is changed": "result = lib.ImageGPTForImageClassification.from_pretrained(saved, num_labels=7).score.weight.shape",
    "a configuration is given": "c = lib.ImageGPTConfig.from_pretrained(saved, output_attentions=True)\nresult = len(lib.ImageGPTModel.from_pretrained(saved, config=c)(tokens).attentions)",
    "a head of another size": "classifier.save_pretrained(folder)\nm = lib.ImageGPTForImageClassification.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)\nresult = m.score.weight.shape",
    "name_or_path": "result = lib.ImageGPTModel.from_pretrained(saved).name_or_path == str(saved)",
    "in eval mode": "result = lib.ImageGPTModel.from_pretrained(saved).training",
    "a class of one's own on the classifier": "class Mine(lib.ImageGPTForImageClassification):\n    def __init__(self, config):\n        super().__init__(config)\n        self.extra = nn.Linear(3, 3)\nm = Mine.from_pretrained(saved)\nresult = m.transformer.wte.weight, m.extra.weight.shape",
    "a class of one's own on the base class": "class Mine(lib.ImageGPTPreTrainedModel):\n    def __init__(self, config):\n        super().__init__(config)\n        self.transformer = lib.ImageGPTModel(config)\n        self.top = nn.Linear(config.n_embd, 2)\n        self.post_init()\n    def forward(self, input_ids):\n        return self.top(self.transformer(input_ids).last_hidden_state.mean(1))\nm = Mine.from_pretrained(saved)\nm.save_pretrained(folder)\nresult = m.transformer(tokens).last_hidden_state, bool((Mine.from_pretrained(folder)(tokens) == m(tokens)).all())",
    "a class of one's own with another forward": "class Mine(lib.ImageGPTForCausalImageModeling):\n    def forward(self, *a, **k):\n        out = super().forward(*a, **k)\n        out['logits'] = -out['logits']\n        return out\nm = Mine.from_pretrained(saved)\nresult = m(tokens).logits, m.generate(tokens[:, :2], max_new_tokens=5, do_sample=False)",
    "torch.save and load": "torch.save(model.state_dict(), folder / 'w.pt')\nother = lib.ImageGPTForCausalImageModeling(config)\nother.load_state_dict(torch.load(folder / 'w.pt'))\nresult = other.eval()(tokens).logits",
    "a pickle of the model": "import pickle\nresult = pickle.loads(pickle.dumps(model))(tokens).logits",
    "a deep copy of the model": "import copy\nresult = copy.deepcopy(model)(tokens).logits",
}

PIECES["passes"] = {
    "layers of a cache": "result = len(model(tokens).past_key_values)",
    "gradients of states": "out = model(tokens, output_hidden_states=True)\nout.hidden_states[0].retain_grad()\nout.logits[0, 0, 0].backward()\nresult = out.hidden_states[0].grad",
    "the first argument": "import inspect\nresult = list(inspect.signature(model.forward).parameters)[0]",
    "the problem from the configuration": "classifier.config.problem_type = 'multi_label_classification'\nresult = classifier(tokens, labels=torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).loss",
    "by attribute, name and place": "out = backbone(tokens)\nresult = out.last_hidden_state, out['last_hidden_state'], out[0]",
    "a tuple": "result = model(tokens, return_dict=False, use_cache=False)",
    "names of the output": "result = list(model(tokens, labels=tokens, output_hidden_states=True).keys())",
    "what was not asked for": "out = model(tokens)\nresult = out.loss, out.get('attentions'), 'attentions' in out",
    "to_tuple": "result = model(tokens, use_cache=False).to_tuple()",
    "unpacked": "loss, logits = model(tokens, labels=tokens, use_cache=False).to_tuple()\nresult = loss, logits",
    "loss of a classifier": "result = classifier(tokens, labels=torch.tensor([0, 2])).loss",
    "loss of several labels": "result = classifier(tokens, labels=torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])).loss",
    "probabilities": "result = classifier(tokens).logits.softmax(-1).argmax(-1).tolist()",
    "attentions": "result = model(tokens, output_attentions=True).attentions",
    "hidden states": "result = model(tokens, output_hidden_states=True).hidden_states",
    "embeddings in place of ids": "result = backbone(inputs_embeds=backbone.wte(tokens)).last_hidden_state",
    "a mask": "mask = torch.ones_like(tokens)\nmask[:, 3] = 0\nresult = backbone(tokens, attention_mask=mask).last_hidden_state",
    "places": "result = backbone(tokens, position_ids=torch.arange(16)[None].flip(1)).last_hidden_state",
    "token types": "result = backbone(tokens, token_type_ids=torch.zeros_like(tokens)).last_hidden_state",
    "a batch of a processor": "result = model(**processor(image, return_tensors='pt')).logits",
    "a cache by hand": "first = model(tokens[:, :9])\nresult = model(tokens[:, 9:], past_key_values=first.past_key_values).logits",
    "the length of a cache": "result = model(tokens).past_key_values.get_seq_length()",
    "tree_map": "from torch.utils._pytree import tree_map\nresult = tree_map(lambda x: x + 1, model(tokens, use_cache=False)).logits",
    "export": "e = torch.export.export(backbone, (tokens,), {'use_cache': False}, strict=False)\nresult = e.module()(tokens, use_cache=False).last_hidden_state",
    "trace": "backbone.config.return_dict = False\nbackbone.config.use_cache = False\nresult = torch.jit.trace(backbone, tokens)(tokens)[0]",
    "compile": "result = torch.compile(backbone, backend='eager')(tokens, use_cache=False).last_hidden_state",
    "functional_call": "result = torch.func.functional_call(model, dict(model.named_parameters()), (tokens,)).logits",
    "bfloat16 under autocast": "with torch.autocast('cpu', torch.bfloat16):\n    result = model(tokens, use_cache=False).logits.dtype",
    "double precision": "result = model.double()(tokens).logits",
    "ids as int32": "result = model(tokens.int()).logits",
    "a field of an output is set": "out = model(tokens)\nout.loss = out.logits.sum()\nresult = out[0]",
}

PIECES["parameters and embeddings"] = {
    "num_parameters": "result = model.num_parameters(), model.num_parameters(only_trainable=True)",
    "without embeddings": "result = model.num_parameters(exclude_embeddings=True)",
    "names of weights": "result = sorted(model.state_dict())",
    "input embeddings": "result = model.get_input_embeddings().weight",
    "output embeddings": "result = model.get_output_embeddings().weight, classifier.get_output_embeddings()",
    "input embeddings are set": "e = nn.Embedding(17, 24)\nmodel.set_input_embeddings(e)\nresult = model.transformer.wte is e",
    "output embeddings are set": "e = nn.Linear(24, 16, bias=False)\nmodel.set_output_embeddings(e)\nresult = model.lm_head is e",
    "more rows": "model.resize_token_embeddings(20)\nresult = model.config.vocab_size, model.get_input_embeddings().weight.shape, model.lm_head.weight.shape, model(tokens).logits[..., :16]",
    "fewer rows": "model.resize_token_embeddings(9)\nresult = model.config.vocab_size, model.transformer.wte.weight, model(tokens.clamp(max=8)).logits",
    "more rows of a backbone": "e = backbone.resize_token_embeddings(19)\nresult = e.num_embeddings, backbone(tokens).last_hidden_state",
    "no new number of rows": "result = model.resize_token_embeddings().weight",
    "base_model": "result = model.base_model is model.transformer, backbone.base_model is backbone",
    "device and dtype": "result = str(model.device), model.dtype",
    "can_generate": "result = model.can_generate(), classifier.can_generate()",
    "main_input_name": "result = model.main_input_name, model.base_model_prefix",
    "config_class": "result = model.config_class is lib.ImageGPTConfig",
    "tie_weights": "config.tie_word_embeddings = True\nm = lib.ImageGPTForCausalImageModeling(config)\nresult = m.lm_head.weight is m.transformer.wte.weight",
    "frozen backbone": "for p in classifier.base_model.parameters():\n    p.requires_grad = False\nresult = classifier.num_parameters(only_trainable=True)",
    "_init_weights": "layer = nn.Linear(5, 5)\nmodel._init_weights(layer)\nresult = bool((layer.bias == 0).all())",
    "memory": "result = model.get_memory_footprint(return_buffers=False)",
    "linear maps by their class": "from transformers.pytorch_utils import Conv1D\nresult = sorted(n for n, m in model.named_modules() if isinstance(m, Conv1D))",
    "models by their class": "from transformers import PreTrainedModel\nresult = isinstance(model, PreTrainedModel), isinstance(model, lib.ImageGPTPreTrainedModel)",
    "a hook on every part": "seen = []\nfor n, m in model.named_modules():\n    m.register_forward_hook(lambda *_, n=n: seen.append(n))\nmodel(tokens)\nresult = sorted(n for n in seen if 'dropout' not in n and not n.endswith('act'))",
    "causal masks as buffers": "result = len(list(model.buffers()))",
}

START = "start = torch.full((2, 1), 16)\n"
PIECES["generation"] = {
    "the likeliest": START + "result = model.generate(start, max_length=17, do_sample=False)",
    "by new tokens": START + "result = model.generate(input_ids=start, max_new_tokens=5, do_sample=False)",
    "as inputs": START + "result = model.generate(inputs=start, max_new_tokens=5, do_sample=False)",
    "arguments that change nothing": START
    + "result = model.generate(start, max_new_tokens=5, do_sample=False, num_beams=1, num_return_sequences=1, repetition_penalty=1.0, length_penalty=1.0, no_repeat_ngram_size=0)",
    "early_stopping and min_length": START
    + "result = model.generate(start, max_new_tokens=5, do_sample=False, early_stopping=False, min_length=0, bos_token_id=16)",
    "a mask of ones": START
    + "result = model.generate(start, attention_mask=torch.ones_like(start), max_new_tokens=5, do_sample=False)",
    "generation_config": "from transformers import GenerationConfig\n"
    + START
    + "result = model.generate(start, generation_config=GenerationConfig(max_new_tokens=6, do_sample=False))",
    "generation_config by place": "from transformers import GenerationConfig\n"
    + START
    + "result = model.generate(start, GenerationConfig(max_length=9, do_sample=False))",
    "generation_config with changes": "from transformers import GenerationConfig\n"
    + START
    + "result = model.generate(start, generation_config=GenerationConfig(max_new_tokens=6, do_sample=True), do_sample=False, max_new_tokens=4)",
    "the model's own generation_config": START
    + "model.generation_config.max_new_tokens = 3\nmodel.generation_config.do_sample = False\nresult = model.generate(start)",
    "a dictionary": START
    + "out = model.generate(start, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)\nresult = out.sequences, out['sequences']",
    "scores": START
    + "out = model.generate(start, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_scores=True, output_logits=True)\nresult = out.scores, out.logits",
    "attentions and states": START
    + "out = model.generate(start, max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True)\nresult = out.attentions, out.hidden_states",
    "scores of what is drawn": START
    + "out = model.generate(start, max_new_tokens=1, do_sample=True, top_k=4, temperature=0.7, return_dict_in_generate=True, output_scores=True)\nresult = out.scores",
    "several of each": START
    + "result = model.generate(start, max_new_tokens=4, do_sample=True, top_k=1, num_return_sequences=3)",
    "the only colour": START + "result = model.generate(start, max_new_tokens=4, do_sample=True, top_k=1)",
    "without a cache": START + "result = model.generate(start, max_new_tokens=4, do_sample=False, use_cache=False)",
    "an end": "result = model.generate(tokens[:, :2], max_new_tokens=9, do_sample=False, eos_token_id=[1, 2, 3, 4, 5], pad_token_id=0)",
    "in training mode": START
    + "model.train()\nmodel.generate(start, max_new_tokens=2, do_sample=False)\nresult = model.training",
    "hooks on the whole model": START
    + "n = []\nmodel.register_forward_hook(lambda *_: n.append(1))\nmodel.generate(start, max_new_tokens=4, do_sample=False)\nresult = len(n)",
    "no length": START[:-1] + "[:, :1]\nresult = model.generate(start, do_sample=False).shape",
    "beams": START + "result = model.generate(start, max_new_tokens=3, num_beams=2, do_sample=False).shape",
    "a penalty": START
    + "result = model.generate(start, max_new_tokens=3, repetition_penalty=2.0, do_sample=False).shape",
    "a processor of logits": "from transformers import LogitsProcessorList\n"
    + START
    + "result = model.generate(start, max_new_tokens=3, do_sample=False, logits_processor=LogitsProcessorList())",
    "prepare_inputs_for_generation": "result = model.prepare_inputs_for_generation(tokens, use_cache=True)['input_ids']",
}

PIECES["images"] = {
    "what save_pretrained gives": "result = [str(f).rsplit('/', 1)[-1] for f in processor.save_pretrained(folder)]",
    "from_dict with changes": "result = dict(type(processor).from_dict(processor.to_dict(), size=42).size)",
    "attributes of one are not those of another": "processor.size = {'height': 9, 'width': 9}\nresult = dict(lib.ImageGPTImageProcessorPil(clusters=processor.clusters).size)",
    "tensors": "result = processor(torch.from_numpy(np.array(image)).permute(2, 0, 1), return_tensors='pt').input_ids",
    "ids": "result = processor(image, return_tensors='pt').input_ids",
    "preprocess": "result = processor.preprocess([image, image], return_tensors='np')['input_ids']",
    "to_dict": "d = processor.to_dict()\nresult = d['size'], d['do_resize'], len(d['clusters'])",
    "from_dict": "result = type(processor).from_dict(processor.to_dict())(image, return_tensors='pt').input_ids",
    "to_json_string": "import json\nresult = json.loads(processor.to_json_string())['do_normalize']",
    "to_json_file and back": "processor.to_json_file(folder / 'p.json')\nresult = type(processor).from_json_file(folder / 'p.json')(image, return_tensors='pt').input_ids",
    "round trip": "processor.save_pretrained(folder)\nresult = lib.ImageGPTImageProcessorPil.from_pretrained(folder)(image, return_tensors='pt').input_ids",
    "a size is set": "processor(image)\nprocessor.size = {'height': 3, 'width': 5}\nresult = processor(image, return_tensors='pt').input_ids",
    "a palette is set": "processor(image)\nprocessor.clusters = np.array(processor.clusters)[::-1].copy()\nresult = processor(image, return_tensors='pt').input_ids",
    "do_color_quantize is set": "processor(image)\nprocessor.do_color_quantize = False\nresult = processor(image, return_tensors='pt').pixel_values.shape",
    "do_normalize is set": "processor(image)\nprocessor.do_normalize = False\nresult = processor(image, return_tensors='pt').input_ids",
    "to a device and dtype": "batch = processor(image, return_tensors='pt').to('cpu', torch.float16)\nresult = batch.input_ids.dtype",
    "pixel values to a dtype": "batch = processor(image, return_tensors='pt', do_color_quantize=False).to('cpu', torch.float16)\nresult = batch.pixel_values.dtype",
    "a batch moves itself": "batch = processor(image, return_tensors='pt')\nbatch.to('meta')\nresult = batch.input_ids.is_meta",
    "keys of a batch": "batch = processor(image, return_tensors='pt')\nresult = list(batch.keys()), 'input_ids' in batch",
    "data of a batch": "result = processor(image, return_tensors='pt').data['input_ids']",
    "model_input_names": "result = list(processor.model_input_names)",
    "a keyword while loading": "result = lib.ImageGPTImageProcessorPil.from_pretrained(saved, size={'height': 2, 'width': 2})(image, return_tensors='pt').input_ids",
    "keywords of the Hub": "result = lib.ImageGPTImageProcessorPil.from_pretrained(saved, cache_dir=folder, local_files_only=True, trust_remote_code=False)(image, return_tensors='pt').input_ids",
    "by their class": "from transformers.image_processing_utils import BaseImageProcessor\nresult = isinstance(processor, BaseImageProcessor)",
    "an image of an array": "result = processor(np.asarray(image), return_tensors='pt').input_ids",
    "a copy": "import copy\nresult = copy.deepcopy(processor)(image, return_tensors='pt').input_ids",
    "the earlier name with torch": "result = lib.ImageGPTImageProcessorFast.__name__.replace('Fast', '')[:22]",
    "an argument of one's own": "result = lib.ImageGPTImageProcessorPil(clusters=processor.clusters, my_note=1).my_note",
}

PIECES["training"] = {
    "a step": "o = torch.optim.SGD(classifier.parameters(), lr=0.1)\nclassifier.train()\nclassifier(tokens, labels=torch.tensor([0, 1])).loss.backward()\no.step()\nresult = classifier.score.weight",
    "gradient checkpointing": "classifier.train()\nclassifier.gradient_checkpointing_enable()\nclassifier(tokens, labels=torch.tensor([0, 1])).loss.backward()\nresult = classifier.transformer.wte.weight.grad",
    "its keywords": "classifier.train()\nclassifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})\nclassifier(tokens, labels=torch.tensor([0, 1])).loss.backward()\nresult = classifier.is_gradient_checkpointing, classifier.transformer.wpe.weight.grad",
    "it is turned off": "classifier.gradient_checkpointing_enable()\nclassifier.gradient_checkpointing_disable()\nresult = classifier.is_gradient_checkpointing",
    "inputs that need gradients": "classifier.enable_input_require_grads()\nresult = classifier.transformer.wte(tokens).requires_grad",
    "supports_gradient_checkpointing": "result = classifier.supports_gradient_checkpointing",
    "dropout is set before": "config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0\nresult = lib.ImageGPTModel(config).drop.p",
}

TRAINER = """from transformers import Trainer, TrainingArguments
data = [{"input_ids": tokens[i % 2], "labels": i % 3} for i in range(8)]
how = TrainingArguments(str(folder), max_steps=2, per_device_train_batch_size=4, report_to=[], save_steps=2,
    use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant", learning_rate=0.01, seed=0, data_seed=0, MORE)
trainer = Trainer(classifier, how, train_dataset=data, eval_dataset=data, processing_class=processor)
trainer.train()
"""
PIECES["Trainer, with accelerate"] = {
    "a training": TRAINER.replace("MORE", "") + "result = classifier.score.weight.detach()",
    "with checkpointing": TRAINER.replace("MORE", "gradient_checkpointing=True")
    + "result = classifier.score.weight.detach()",
    "operations are counted": TRAINER.replace("MORE", "") + "result = trainer.state.total_flos",
    "an evaluation": TRAINER.replace("MORE", "") + "result = trainer.evaluate()['eval_loss']",
    "predictions": TRAINER.replace("MORE", "") + "result = trainer.predict(data).predictions",
    "a checkpoint has its configuration": TRAINER.replace("MORE", "")
    + "result = [(folder / 'checkpoint-2' / n).is_file() for n in ('config.json', 'model.safetensors', 'preprocessor_config.json')]",
    "a checkpoint is a model": TRAINER.replace("MORE", "")
    + "result = lib.ImageGPTForImageClassification.from_pretrained(folder / 'checkpoint-2')(tokens).logits",
    "save_model": TRAINER.replace("MORE", "")
    + "trainer.save_model(str(folder / 'out'))\nresult = lib.ImageGPTForImageClassification.from_pretrained(folder / 'out')(tokens).logits",
    "a metric": TRAINER.replace("MORE", "")
    + "trainer.compute_metrics = lambda p: {'acc': float((p.predictions.argmax(-1) == p.label_ids).mean())}\nresult = trainer.evaluate()['eval_acc']",
}

AUTO = "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification\n"
PIECES["pipelines and Auto classes"] = {
    "features of an image": "from transformers import pipeline\nresult = pipeline('image-feature-extraction', model=backbone, image_processor=processor)(image)",
    "a pipeline of objects": "from transformers import pipeline\nresult = pipeline('image-classification', model=classifier, image_processor=processor)(image, top_k=3)",
    "a pipeline over several": "from transformers import pipeline\nresult = pipeline('image-classification', model=classifier, image_processor=processor)([image, image], top_k=1)",
    "AutoConfig": AUTO
    + "result = AutoConfig.from_pretrained(saved).n_embd, type(AutoConfig.from_pretrained(saved)) is lib.ImageGPTConfig",
    "AutoModel": AUTO
    + "m = AutoModel.from_pretrained(saved)\nresult = m(tokens).last_hidden_state, type(m) is lib.ImageGPTModel",
    "AutoModel of a configuration": AUTO
    + "result = type(AutoModelForImageClassification.from_config(config)) is lib.ImageGPTForImageClassification",
    "AutoModelForImageClassification": AUTO
    + "classifier.save_pretrained(folder)\nresult = AutoModelForImageClassification.from_pretrained(folder)(tokens).logits",
    "AutoImageProcessor": AUTO
    + "result = AutoImageProcessor.from_pretrained(saved, backend='pil')(image, return_tensors='pt').input_ids",
    "a pipeline of a folder": "from transformers import pipeline\nclassifier.save_pretrained(folder)\nprocessor.save_pretrained(folder)\nresult = pipeline('image-classification', model=str(folder))(image, top_k=3)",
}

LORA = "from peft import LoraConfig, get_peft_model\nm = get_peft_model(model, LoraConfig(r=2, MORE))\nresult = "
NAMES = "sorted(n for n, _ in m.named_parameters() if 'lora_' in n and 'lm_head' not in n)"
PIECES["peft"] = {
    "all-linear": LORA.replace("MORE", "target_modules='all-linear'")
    + "sorted(n for n, _ in m.named_parameters() if 'lora_' in n)",
    "chosen maps": LORA.replace("MORE", "target_modules=['c_attn', 'c_fc']") + NAMES,
    "embedding of places": LORA.replace("MORE", "target_modules=['wpe']") + NAMES,
    "what it gives": LORA.replace("MORE", "target_modules=['c_attn']")
    + "m(tokens).logits, m.merge_and_unload()(tokens).logits",
    "what is trained": LORA.replace("MORE", "target_modules=['c_attn']") + "m.get_nb_trainable_parameters()",
    "for causal models": LORA.replace("MORE", "target_modules=['c_attn'], task_type='CAUSAL_LM'") + "m(tokens).logits",
    "generate": LORA.replace("MORE", "target_modules=['c_attn'], task_type='CAUSAL_LM'")
    + "m.generate(input_ids=tokens[:, :2], max_new_tokens=4, do_sample=False)",
}

# What differs, and why; every piece here must go on to differ.
DIFFERS = {
    "pipelines and Auto classes: features of an image": "this pipeline unpacks `ModelOutput` alone; our outputs are dicts",
    "configuration: a misspelt argument": "there it is kept and changes nothing; here TypeError names the field",
    "parameters and embeddings: causal masks as buffers": "a square of positions in every layer; here none",
    "generation: no length": "20 tokens, a default for text; here a length must be given",
    "images: an argument of one's own": "there a misspelt argument is kept and changes nothing; here TypeError",
}
