def tell_story(*, leave_ui_up: bool) -> int:
    raise NotImplementedError(leave_ui_up)
