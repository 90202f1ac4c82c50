"""Submitting a job."""

import re
import secrets

from fastapi import Request, Response

from server import asset_parameters
from server.auth import Caller
from server.dashboard import submission as forms
from server.dashboard.forms import read as read_params
from server.dashboard.pages import back, render
from server.dashboard.routes.common import Form, GivenId, page_router
from server.dashboard.submission import PARAMS, SubmitForm
from server.errors import InvalidError, NotFoundError, QuotaError
from server.ids import new_id
from server.routes.common import Submitter, UsesServices
from server.schemas import Submission
from server.services import Services
from tuner.errors import UnknownNameError
from tuner.recipes import Recipe

router = page_router("/submit")

_MOST_UPLOADS = 200  # the newest, to choose from
_KEY = re.compile(r"[0-9a-z]{1,64}")


@router.get("")
def show_form(
    request: Request,
    services: UsesServices,
    caller: Submitter,
    recipe: str = "",
    like: GivenId = "",
) -> Response:
    """Show the recipes, and the form of the one that was chosen; `like` names a job to copy."""
    if like:
        job = services.jobs.get(like)
        submitted = Submission.model_validate(
            {name: getattr(job, name) for name in Submission.model_fields}
        )
        texts = forms.texts_of(submitted)
        form = forms.shown(_recipe(services, job.recipe), job.params, texts)
    elif recipe:
        form = forms.shown(_recipe(services, recipe), {}, {})
    else:
        form = None
    return _page(request, services, caller, form, new_id())


@router.post("")
def submit(request: Request, services: UsesServices, caller: Submitter, form: Form) -> Response:
    """Queue the job that the form describes, or show what is wrong with it."""
    recipe = _recipe(services, form.get("recipe", ""))
    key = form.get("key", "")
    if not _KEY.fullmatch(key):
        key = secrets.token_hex(8)
    read = forms.read(form, recipe, services.catalog)
    errors = dict(read.errors)
    if read.submission is not None:
        errors |= _foreign_uploads(services, read.submission, caller.owner)
    if read.submission is not None and not errors:
        try:
            job, _ = services.jobs.submit(
                read.submission,
                caller.owner,
                f"form-{key}",  # a second click gives the same job
                services.settings.max_queued_jobs,
            )
            return back(f"/jobs/{job.id}")
        except QuotaError as error:
            errors[""] = str(error)
    params = read_params(recipe.parameters.model_json_schema(), form, PARAMS)
    shown = forms.shown(recipe, params, form, errors)
    return _page(request, services, caller, shown, new_id(), status=422)


def _foreign_uploads(services: Services, submission: Submission, owner: str) -> dict[str, str]:
    """Return what is wrong with the uploads that a submission names, by the name of the field."""
    schema = services.catalog.schema(submission.recipe)
    try:
        asset_parameters.check(services.assets, schema, submission.params, owner)
    except InvalidError as error:
        found = error.details["errors"]
        return {".".join(one["pointer"].split("/")[1:3]): one["detail"] for one in found}
    return {}


def _recipe(services: Services, name: str) -> Recipe:
    try:
        return services.catalog.get(name)
    except UnknownNameError as error:
        raise NotFoundError(str(error)) from error


def _page(
    request: Request,
    services: Services,
    caller: Caller,
    form: SubmitForm | None,
    key: str,
    status: int = 200,
) -> Response:
    if form is not None:
        form = forms.with_uploads(form, services.assets.page(caller.owner, _MOST_UPLOADS))
    return render(
        request,
        "submit.html",
        status,
        form=form,
        key=key,
        recipes=services.catalog.recipes,
        broken=services.catalog.broken,
    )
