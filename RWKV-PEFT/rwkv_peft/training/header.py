"""The header of a run: its model, trained and frozen parts, machine, data, steps, rate and output."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from ..adapters.inject import InjectReport
from ..adapters.methods import method_of
from ..cli.names import NONE, STATE
from ..cli.parser import counted
from ..config import FEW, AdapterConfig, RunConfig
from ..config.objective import TEACHER
from ..config.train import SCHEDULES
from ..data.samples import Samples
from ..gpus import better_precision
from ..models import family_named
from ..models.family import Family
from ..ops import products
from ..ops.cuda_kernels import KERNELS
from .engine import loses_in_sums
from .inputs import Inputs
from .rates import automatic_rate
from .step.context_parallel import in_flight, waiting
from .step.plan import Plan
from .step.shared_prefix import saved_tokens

UPSTREAM_PARTS = ("time", "ln")  # what RWKV-PEFT trains along with an adapter by default


def describe(
    inputs: Inputs, accelerator: str, notes: Sequence[str], report: InjectReport, say: Callable[..., object]
) -> None:
    """Print the header of a run."""
    config, samples, plan = inputs.config, inputs.samples, inputs.plan
    model, train, data, adapter = config.model, config.train, config.data, config.adapter
    family = family_named(model.version)
    say(
        f"model     {family.name}, {counted(model.n_layer, 'layer')}, {model.n_embd} channels, "
        f"{counted(model.n_head, 'head')} of {model.head_size}, vocabulary {model.vocab_size}"
        + (f", from {train.load_model}" if train.load_model else ", new")
    )
    reading = ", which reads each row behind its context" if data.of_contexts else ""
    if teacher := inputs.teacher:
        size = f"{counted(teacher.config.n_layer, 'layer')}, {teacher.config.n_embd} channels"
        say(f"teacher   {teacher.family.name}, {size}, from {teacher.path}{reading}")
    elif TEACHER in config.objective.needs:
        say(f"teacher   the base, without what trains{reading}")
    say(f"training  {describe_adapter(adapter)}: {report}")
    may_train = adapter.method != NONE and not config.objective.asks_base  # which needs the base as it is
    if may_train and (note := frozen_parts(adapter, family, family.shapes(model))):
        say(f"          {note}")
    if STATE in adapter.train_parts and not adapter.states_alone:
        say(f"          the states' learning rate is {train.state_lr:g} after warm-up (--state_lr)")
    if adapter.states_alone:
        say("          states alone take on a manner, and few facts, and no end that the base has not learned")
        say("          (docs/guides/states.md); an adapter learns all of them")
    if STATE in adapter.train_parts and "shift" in adapter.state_parts:
        say("          shifts train (--state_parts): only rwkv-peft starts from them, and no other runtime")
    # A kernel that is missing costs most of the speed, so the line says which one runs, and why another does not.
    kernel = "cuda" if accelerator == "gpu" else "cpu"
    reason = family.kernels(kernel).get(kernel, f"{family.name} has none for a {accelerator} yet")
    say(
        f"machine   {train.num_nodes} x {train.devices} {accelerator}, "
        + f"{train.strategy}, " * train.uses_zero
        + f"{train.precision}, "
        f"{family.kernel} kernel: {kernel if reason is None else f'plain torch, which is slow ({reason})'}"
    )
    if accelerator == "cpu":
        say(f"          products: {products.row()} ({products.row().known})")
    if note := better_precision(train.precision, accelerator):
        say(f"          {note}")
    if train.context_parallel > 1:
        say(f"          {shared_rows(config)}")
    if train.compile:
        say("          blocks are compiled: the first steps take a minute or more")
    if accelerator == "gpu":
        for what, kernels in KERNELS:
            reason = kernels.unavailable()
            say(f"          {what}: {'cuda' if reason is None else f'plain torch ({reason})'}")
    files = ", ".join(data.files)
    say(f"data      {files}: {counted(len(samples), samples.kind)} of up to {data.ctx_len} tokens")
    for note in notes:
        say(f"          {note}")
    if words := config.objective.describe():
        say(f"objective {words}")
    if saved := saved_tokens(config, samples, accelerator):
        say(f"          a prompt is computed once for both answers, which saves {saved:,} tokens of a micro batch")
    if train.chunk_ctx:
        say(f"          computed in segments of {train.chunk_ctx:,} tokens, the state carried over")
    for line in outlook(config, samples, plan):
        say(line)
    if inputs.state:
        say(f"          resuming after step {plan.first_step:,}")
    if loses_in_sums(train):
        say(
            f"          note: {train.accumulate_grad_batches:,} gradients a step are added up in bfloat16, which loses "
            "some of them; --strategy deepspeed_stage_2 adds them up in float32"
        )
    if train.warmup_steps > plan.total_steps and "W" in SCHEDULES[train.lr_schedule].formula:
        say(f"          note: --warmup_steps {train.warmup_steps} do not end by then: the rate stays below --lr_init")
    stays = train.lr_schedule == "constant" or train.lr_final == train.lr_init
    chosen = f"{train.lr_init:g}" if stays else f"{train.lr_init:g} to {train.lr_final:g}"
    if train.lr_chosen:
        rule = automatic_rate(adapter, model.n_embd, config.objective, not train.load_model)
        why = "as the run began" if inputs.state else rule.reason
        if train.lr_init != rule.value and not inputs.state:
            why += f", times the root of {data.micro_bsz} rows"
        say(f"rate      {chosen} (--lr_init auto: {why}; docs/guides/learning-rates.md)")
    elif train.lr_init >= 1 and not adapter.states_alone:  # states, which take rates near 1
        say(f"rate      note: {train.lr_init:g} moves each number by about as much in a step; rates are far below 1")
    else:
        say(f"rate      {chosen}")
    if train.optim != "adamw":
        say(f"optimizer {train.optim}")
    say(f"seed      {train.random_seed}")
    say(f"output    {train.proj_dir}")


def outlook(config: RunConfig, samples: Samples, plan: Plan) -> Iterator[str]:
    """Yield lines on the steps of a run and on how often each row or window is read."""
    train, data, unit = config.train, config.data, samples.counted
    epochs = f"{counted(train.epoch_count, 'epoch')} of {counted(plan.epoch_steps, 'step')}"
    # Of the run as a whole, also where a part of it is done: a resumed run shows the same numbers.
    steps = plan.total_steps - train.epoch_begin * plan.epoch_steps
    read = samples.seen(steps * plan.step_samples)
    seen = (f"{f'of {name} ' * bool(name)}{n:.3g} {'time' if n == 1 else 'times'}" for name, n in read.items())
    yield (
        f"steps     {steps:,}: {counted(samples.size, unit)}, {epochs}, {counted(plan.step_samples, samples.kind)} a "
        f"step; each {unit} is seen {', '.join(seen)}"
    )
    if train.epochs_chosen:
        yield f"          chosen: epochs for {config.objective.aim} steps (--epoch_count)"
        if not train.epoch_save:
            yield "          saved at the end (--epoch_save 1: after each epoch too)"
    if steps < FEW:
        smaller = ", or a smaller --micro_bsz has more steps an epoch" if data.micro_bsz > 1 else ""
        few = f"{counted(steps, 'step')} {'is' if steps == 1 else 'are'} few to learn from"
        count = train.epoch_begin + -(-FEW // plan.epoch_steps)
        yield f"          note: {few}: --epoch_count {count} has {FEW} or more{smaller}"
    if data.of_answers and data.dataload == "pad":
        yield "          each row by itself (--dataload pad; pack puts several into one, for fewer, longer steps)"


def shared_rows(config: RunConfig) -> str:
    """How ranks share rows, with the largest share of a pass that they wait for each other: rows may be shorter."""
    parts, segment, length = config.train.context_parallel, config.train.chunk_ctx, config.data.ctx_len
    blocks = config.model.n_layer
    segments = -(-length // segment) if segment else in_flight(parts, blocks, length)
    what = "segment of a row" if segment else "row" + f", {segments} pieces of it at a time" * (segments > 1)
    share = waiting(parts, blocks, segments)
    return f"{parts} ranks share each {what} (--context_parallel), and wait {share:.1%} of a pass for each other"


def describe_adapter(adapter: AdapterConfig) -> str:
    """A few words on the parts that train."""
    words, method = ["full model"], method_of(adapter)
    if method is not None:
        words = [method.label, method.size_words(vars(adapter))]
    elif adapter.states_alone:
        words = ["time states"]
    elif adapter.train_parts:
        words = ["parts of the model"]
    if adapter.quant != "none":
        words.append(f"--quant {adapter.quant}")
    if adapter.train_parts:
        words.append(f"--train_parts {' '.join(adapter.train_parts)}")
    return ", ".join(words)


def frozen_parts(adapter: AdapterConfig, family: Family, keys: Iterable[str]) -> str:
    """A line on the frozen parts of the base, with the flag that trains them along; "" if all parts train."""
    tensors = Counter(family.part_of(key) for key in keys)
    frozen = [part for part in family.parts if part not in adapter.train_parts]
    if not frozen:
        return ""
    named = ", ".join(f"{part} ({tensors[part]})" for part in frozen)
    usual = [part for part in UPSTREAM_PARTS if part in frozen]
    advice = f"--train_parts {' '.join(dict.fromkeys([*adapter.train_parts, *(usual or frozen)]))} trains them along"
    if usual:
        advice = advice.replace("them", " and ".join(usual)) + ", as RWKV-PEFT does unless told otherwise"
    return f"tensors of the base that do not train: {named}; {advice}"
