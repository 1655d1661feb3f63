server {
  bind_address = "127.0.0.1" # all
  bind_port = "8081"
  trust_domain = "example.org"
  data_dir = <<END
/tmp
END
  admin_ids = ["spiffe://other.test/a",]
  ca_ttl = "1h30m"
  ratelimit { attestation = false }
}
plugins {
  DataStore "sql" { plugin_data { database_type = "sqlite3" } }
  KeyManager "disk" { plugin_data { keys_path = "k" } }
  NodeAttestor "join_token" { plugin_data {} }
}
