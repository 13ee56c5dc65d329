"""What an adapter is, whether it is valid, where it lives.

store         what routers and runners call
incoming      an upload arriving: sizes and digests as declared; scratch is where it waits
validate      an adapter's files against each other and the base model (base_model, peft_config,
              peft_options, pattern, safetensors_file, json_text, magnitude, limits, names)
catalog       one tenant's versions and aliases, as a value; catalog_json writes it, tenants keeps
              them in the store
blobs         bytes by digest; garbage deletes what nobody needs; strays are not ours
objects       the object store underneath; local_objects for directories; location opens either
"""
