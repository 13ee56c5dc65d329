"""What an adapter is, whether it is valid, where it lives.

store       what routers and runners call
format/     whether an adapter's files are valid: validate checks them against each other and
            against the base model
catalog/    a tenant's versions and aliases, as a value; its JSON; all tenants' in the store
blobs/      bytes by digest; uploads that arrive; bytes that nobody needs any more
objects/    the object store underneath: directories, S3 and others
limits      how much a tenant may upload
names       names of tenants and adapters, and references to them
"""
