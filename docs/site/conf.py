"Sphinx: pages that were executed elsewhere, mathematics and search without a network."
import warnings

warnings.filterwarnings('ignore', category=DeprecationWarning)

project = 'rab_nb'
author = 'The rab_nb authors'
copyright = '2026, the rab_nb authors'
html_title = 'rab_nb'
root_doc = 'index'
extensions = ['myst_nb', 'sphinx_design', 'sphinx.ext.mathjax', 'sphinx-mathjax-offline']
exclude_patterns = ['conf.py', '_static', 'files/**']
nitpicky = True
nitpick_ignore_regex = [('py:.*', r'(?!rab_nb\.).*')]

nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_code_prompt_show = 'Show the code'
nb_code_prompt_hide = 'Hide the code'
nb_merge_streams = True
nb_render_markdown_format = 'myst'
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_block', 'attrs_inline', 'deflist', 'fieldlist', 'colon_fence']
myst_heading_anchors = 4
myst_dmath_double_inline = True
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header']  # an aside may skip a heading level

python_use_unqualified_type_names = True
python_display_short_literal_types = True
add_module_names = False
maximum_signature_line_length = 76
toc_object_entries_show_parents = 'hide'

html_theme = 'furo'
html_static_path = ['_static']
html_css_files = ['site.css']
html_js_files = ['site.js']
html_copy_source = False
html_show_sphinx = False
html_favicon = '_static/favicon.svg'
html_theme_options = {
    'navigation_with_keys': True,
    'light_css_variables': {'color-brand-primary': '#005a8c', 'color-brand-content': '#005a8c', 'color-brand-visited': '#5b3f8c'},
    'dark_css_variables': {'color-brand-primary': '#7cc4f2', 'color-brand-content': '#7cc4f2', 'color-brand-visited': '#c3a6f0'},
}
pygments_style = 'tango'
pygments_dark_style = 'github-dark'
mathjax3_config = {'options': {'enableMenu': False}, 'chtml': {'displayAlign': 'center'}}
